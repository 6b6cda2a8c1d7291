"""A client's connections to the agent, and its view of the agent's memory.

A link is in one place: idle in the pool, or with the thread that took it. After a fork the child
starts with an empty pool, for two processes must never speak on one socket.
"""

import logging
import mmap
import os
import select
import socket
import threading
import weakref
from pathlib import Path
from typing import Any

from weightstream.cachefs.agent import wire
from weightstream.cachefs.agent.finding import SOCKET
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.source import Transfer
from weightstream.cachefs.origin.forks import forget_in_child
from weightstream.cachefs.origin.interrupt import Interrupt
from weightstream.cachefs.origin.receive import set_kernel_timeouts
from weightstream.cachefs.store.write_back import copy
from weightstream.errors import LoadCancelled

log = logging.getLogger(__name__)

_MOST_IDLE = 32
_READ_BYTES = 4096
_TEXT_BYTES = 1 << 16


class Memory:
    """The agent's arena, mapped: this process can neither change nor cut it."""

    def __init__(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        # Private, for the descriptor cannot be written, and a view that `copy` takes must be.
        flags, access = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        self._map = mmap.mmap(descriptor, size, flags=flags, prot=access)
        self.view = memoryview(self._map)


class Link:
    """One connection to the agent."""

    def __init__(self, sock: socket.socket, longest: int, memory: Memory | None) -> None:
        self._sock = sock
        self._longest = longest
        self._memory = memory
        self._unread = b""
        self._hangup = select.poll()
        self._hangup.register(sock, select.POLLHUP | select.POLLERR | select.POLLRDHUP)

    def read(self, root: str, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into`, or as much of it as one request may ask for.

        Raises `AgentBusy`, `LoadCancelled`, and OSError for everything that can be wrong with an
        agent. The link is of no use afterwards.
        """
        into = into[: self._longest]
        interrupt = Interrupt()
        interrupt.watch(self._sock)
        transfer.on_cancel(interrupt.fire)
        try:
            self._ask(root, blob, Extent(start, start + len(into)), transfer.urgent)
            answer = wire.receive_head(self._sock)
            if answer.get("busy") is True:
                raise wire.AgentBusy("its memory is all in use")
            if "error" in answer:
                raise wire.AgentRefusal(str(answer["error"]))
            self._receive(self._place(answer, len(into)), into, transfer)
        except OSError as error:
            if interrupt.fired:
                raise LoadCancelled("the range is not wanted any more") from error
            if isinstance(error, BlockingIOError):
                raise wire.WireError(f"no sign of life for {wire.SILENCE_S:g} s") from error
            raise
        finally:
            transfer.on_cancel(None)
            interrupt.watch(None)

    def tell(self, message: dict[str, Any]) -> None:
        """Send a request that is answered by one head; raises OSError when it is refused."""
        wire.send_head(self._sock, message)
        answer = wire.receive_head(self._sock)
        if "error" in answer:
            raise wire.AgentRefusal(str(answer["error"]))

    def is_alive(self) -> bool:
        """Say whether the agent has not closed the idle connection."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN | select.POLLHUP | select.POLLERR)
        return not poller.poll(0)

    def close(self) -> None:
        """Close it; an agent that reads for it stops."""
        self._sock.close()

    def _ask(self, root: str, blob: Blob, extent: Extent, urgent: bool) -> None:
        request = {"op": "read", "root": root, "range": [extent.start, extent.stop]}
        wire.send_head(self._sock, {**request, **wire.blob_to_json(blob), "urgent": urgent})

    def _place(self, answer: dict[str, Any], count: int) -> memoryview | None:
        """Return where in shared memory the bytes are going to be; None when they come inline."""
        if answer.get("inline") is True:
            return None
        offset = wire.count_of(answer, "offset")
        if self._memory is None or offset + count > len(self._memory.view):
            raise wire.WireError(f"no memory at {offset}")
        return self._memory.view[offset : offset + count]

    def _receive(self, place: memoryview | None, into: memoryview, transfer: Transfer) -> None:
        """Take what comes until the agent says that this was all."""
        done = 0
        while True:
            kind, count = self._frame(inline=place is None)
            if kind == wire.BYTES and 0 < count <= len(into) - done:
                if place is not None:
                    copy(place[done : done + count], into[done : done + count])
                    self._check_still_ours()
                else:
                    self._receive_inline(into[done : done + count])
                done += count
                transfer.advance(count)
            elif kind == wire.END and done == len(into):
                break
            elif kind in (wire.FAILED, wire.BROKEN) and count <= _TEXT_BYTES:
                raise self._failure(kind, count)
            elif kind != wire.BEAT:
                raise wire.WireError(f"frame {kind} {count} after {done} of {len(into)} bytes")
        if place is not None:
            self._sock.sendall(wire.FREE)

    def _check_still_ours(self) -> None:
        """Raise when the slot may have been another client's while it was copied.

        The agent takes a slot back from a client that is too slow, and hangs up before it does.
        """
        if self._hangup.poll(0):
            raise wire.WireError("the agent closed the connection")

    def _failure(self, kind: int, count: int) -> Exception:
        missing = max(0, count - len(self._unread))
        text = (self._unread + wire.receive_exactly(self._sock, missing)).decode("utf-8", "replace")
        return wire.AgentBusy(text) if kind == wire.BROKEN else wire.AgentRefusal(text)

    def _frame(self, inline: bool) -> tuple[int, int]:
        """Return the next frame's kind and count; inline, nothing behind it is read."""
        size = wire.FRAME.size
        while len(self._unread) < size:
            part = self._sock.recv(size - len(self._unread) if inline else _READ_BYTES)
            if not part:
                raise wire.WireError("the agent closed the connection")
            self._unread += part
        frame, self._unread = self._unread[:size], self._unread[size:]
        kind, count = wire.FRAME.unpack(frame)
        return kind, count

    def _receive_inline(self, into: memoryview) -> None:
        done = 0
        while done < len(into):
            count = self._sock.recv_into(into[done:], 0, socket.MSG_WAITALL)
            if count == 0:
                raise wire.WireError("the agent closed the connection")
            done += count


class Links:
    """The idle links of one source. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._idle: list[Link] = []
        self._memory: tuple[int, Memory] | None = None
        weakref.finalize(self, _close_all, self._idle)
        self.forget()
        forget_in_child(self)

    def forget(self) -> None:
        """Start empty: in a forked child the sockets are the parent's; what is mapped stays."""
        self._lock = threading.Lock()
        _close_all(self._idle)

    def take(self) -> Link:
        """Return an idle link or a new one; raises OSError when the agent is not there."""
        while True:
            with self._lock:
                link = self._idle.pop() if self._idle else None
            if link is None:
                return self._connect(shares=True)
            if link.is_alive():
                return link
            link.close()

    def give_back(self, link: Link) -> None:
        """Keep a link whose answer was read to its end."""
        with self._lock:
            if len(self._idle) < _MOST_IDLE:
                self._idle.append(link)
                return
        link.close()

    def plan(self, message: dict[str, Any]) -> Link:
        """Return a link on which the agent holds a plan."""
        link = self._connect(shares=False)
        try:
            link.tell(message)
        except BaseException:
            link.close()
            raise
        return link

    def ask(self, message: dict[str, Any]) -> None:
        """Send a request that is answered by one head; raises OSError when it is refused."""
        link = self.plan(message)
        link.close()

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            _close_all(self._idle)

    def _connect(self, shares: bool) -> Link:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            set_kernel_timeouts(sock, wire.SILENCE_S)
            with wire.socket_address(self._directory, SOCKET) as path:
                sock.connect(path)
            pid, uid = wire.peer(sock)
            if not wire.is_trusted(uid):
                raise wire.WireError(f"process {pid} of user {uid} is not this user's agent")
            wire.send_head(sock, {"op": "hello", "version": wire.VERSION, "shares": shares})
            answer, descriptor = wire.receive_greeting(sock)
            try:
                if answer.get("version") != wire.VERSION:
                    raise wire.WireError(f"the agent speaks version {answer.get('version')!r}")
                memory = self._map(descriptor) if descriptor >= 0 else None
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
            return Link(sock, wire.count_of(answer, "longest"), memory)
        except BaseException:
            sock.close()
            raise

    def _map(self, descriptor: int) -> Memory:
        """Return the agent's memory, mapped once for all links; a new agent has another."""
        inode = os.fstat(descriptor).st_ino
        with self._lock:
            if self._memory is None or self._memory[0] != inode:
                self._memory = inode, Memory(descriptor)
            return self._memory[1]


def _close_all(idle: list[Link]) -> None:
    while idle:
        idle.pop().close()
