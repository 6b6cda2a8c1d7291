"""One client of the agent: its requests, one after the other.

The thread of a connection reads a range from the agent's source into a slot of the arena and says
how far it is. A slot is the client's until it says that it has copied the bytes, or is gone.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from weightstream import metrics
from weightstream.cachefs.agent import wire
from weightstream.cachefs.agent.arena import Arena, Slot
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.checks import refute
from weightstream.cachefs.fetch.memory import allocate
from weightstream.cachefs.fetch.source import Plan, Source
from weightstream.cachefs.origin.receive import set_kernel_timeouts
from weightstream.errors import LoadCancelled, WeightstreamError
from weightstream.log import mask_secrets

log = logging.getLogger(__name__)

_IDLE_S = 60.0  # a client that asks nothing; its next request opens a connection anew
_MESSAGE_S = 10.0  # the rest of a message, an answer that nobody reads, a slot that is not freed
_SLOT_S = 0.7 * wire.SILENCE_S  # afterwards the client reads by itself
_INLINE_BYTES = 1 << 20
_TOGETHER_BYTES = 2 << 20
_TOGETHER_S = 0.025
_ASKED_BYTES = 64 << 10


class Reads(Protocol):
    """Whom connections ask: the agent."""

    def source_of(self, root: str, blob: Blob) -> Source:
        """Return where to read a blob that lies under `root`; raises `UsageError`."""
        ...

    def plan(self, root: str, wanted: Sequence[tuple[Blob, tuple[Extent, ...]]]) -> Plan:
        """Hear what a client is going to read."""
        ...


class Relay:
    """The `Transfer` of one range: passes on how far it is, and that nobody wants it any more."""

    step_bytes = 1 << 20
    is_fresh = False  # slots are faulted in when they are made

    def __init__(self, send: Callable[[int], None], urgent: bool) -> None:
        self.urgent = urgent
        self._send = send
        self._lock = threading.Lock()
        self._callback: Callable[[], None] | None = None
        self._cancelled = False

    def link_share(self) -> None:
        """See `Transfer.link_share`: the agent's own streams know theirs."""

    def advance(self, count: int) -> None:
        """See `Transfer.advance`."""
        if self._cancelled:
            raise LoadCancelled("the client is gone")
        try:
            self._send(count)
        except OSError as error:
            raise LoadCancelled(f"the client is gone: {error}") from error

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        """See `Transfer.on_cancel`."""
        with self._lock:
            self._callback = callback
            now = self._cancelled
        if now and callback is not None:
            callback()

    def cancel(self) -> None:
        """Unblock the reading thread."""
        with self._lock:
            self._cancelled = True
            callback = self._callback
        if callback is not None:
            callback()


class Teller:
    """Tells a client how far its range in shared memory is, and that it goes on. Thread-safe.

    At every step when a reader waits, or the link is slow. On a fast one a client that is woken for
    each MiB, and wakes the agent's threads by turns, costs as much as its copying: there two steps
    are told together.
    """

    def __init__(self, sock: socket.socket, sends: threading.Lock, urgent: bool) -> None:
        self._together_s = 0.0 if urgent else _TOGETHER_S
        self._sock = sock
        self._sends = sends
        self._untold = 0
        self._told_s = 0.0
        self._is_over = False

    def advance(self, count: int) -> None:
        """Hear that the next `count` bytes are valid."""
        metrics.AGENT_BYTES.inc(count)
        with self._sends:
            self._untold += count
            now_s = time.monotonic()
            if self._untold >= _TOGETHER_BYTES or now_s - self._told_s >= self._together_s:
                self._told_s = now_s
                self._sock.sendall(self._news())

    def end(self, kind: int, text: str = "") -> None:
        """Say the last word of the range."""
        data = text.encode()[:_ASKED_BYTES]
        with self._sends:
            self._is_over = True
            self._sock.sendall(self._news() + wire.FRAME.pack(kind, len(data)) + data)

    def beat(self) -> None:
        """Say what was not told yet, and that the range goes on; never waits."""
        if not self._sends.acquire(blocking=False):
            return  # it is being told more than that
        untold = self._untold
        try:
            if self._is_over:  # what comes next is the answer to another request
                return
            news = self._news() or wire.FRAME.pack(wire.BEAT, 0)
            self._sock.send(news, socket.MSG_DONTWAIT)  # so few bytes go whole or not at all
        except BlockingIOError:
            self._untold = untold  # it has enough to read
        finally:
            self._sends.release()

    def _news(self) -> bytes:
        count, self._untold = self._untold, 0
        return wire.FRAME.pack(wire.BYTES, count) if count else b""


class Connection:
    """One connection; `run` it on a thread of its own. The other methods are for any thread."""

    def __init__(self, sock: socket.socket, arena: Arena | None, reads: Reads) -> None:
        self._sock = sock
        self._arena = arena
        self._reads = reads
        self._relay: Relay | None = None
        self._teller: Teller | None = None
        self._inline: memoryview | None = None
        self._sends = threading.Lock()

    def run(self) -> None:
        """Serve until the client is gone, is silent for long, or breaks the protocol."""
        set_kernel_timeouts(self._sock, _MESSAGE_S)
        try:
            self._greet()
            while self._is_asked():
                self._serve(wire.receive_head(self._sock))
        except OSError as error:
            log.debug("a client's connection ends: %s", error)
        except WeightstreamError as error:
            log.debug("a client is not served: %s", error)

    def beat(self) -> None:
        """Say that the range goes on, where one does; end it where nobody hears that."""
        relay, teller = self._relay, self._teller
        if relay is None or teller is None:
            return
        try:
            teller.beat()
        except OSError:
            relay.cancel()

    def cancel(self) -> None:
        """End what runs, and the connection."""
        self._hang_up()
        relay = self._relay
        if relay is not None:
            relay.cancel()

    def close(self) -> None:
        """Close the socket; the connection's thread has ended."""
        self._sock.close()

    def _hang_up(self) -> None:
        with suppress(OSError):  # the client did
            self._sock.shutdown(socket.SHUT_RDWR)

    def _greet(self) -> None:
        hello = wire.receive_head(self._sock, _ASKED_BYTES)
        if hello.get("op") != "hello" or hello.get("version") != wire.VERSION:
            raise wire.WireError(f"a client of another protocol: {str(hello)[:80]}")
        arena = self._arena if hello.get("shares") else None
        self._arena = arena
        longest = arena.slot_bytes if arena is not None else _INLINE_BYTES
        answer = {"version": wire.VERSION, "pid": os.getpid(), "longest": longest}
        wire.send_head(self._sock, answer, arena.descriptor if arena is not None else -1)

    def _is_asked(self) -> bool:
        """Wait for the next request; False when none comes."""
        set_kernel_timeouts(self._sock, _IDLE_S)
        try:
            asked = bool(self._sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        set_kernel_timeouts(self._sock, _MESSAGE_S)
        return asked

    def _serve(self, request: dict[str, Any]) -> None:
        match request.get("op"):
            case "read":
                self._read(request)
            case "plan":
                self._plan(request)
            case "refute":
                self._refute(request)
            case other:
                raise wire.WireError(f"no request: {str(other)[:80]}")

    # Ranges

    def _read(self, request: dict[str, Any]) -> None:
        blob = wire.blob_of(request)
        extent = wire.extent_of(request.get("range"), blob)
        longest = self._arena.slot_bytes if self._arena is not None else _INLINE_BYTES
        if len(extent) > longest:
            raise wire.WireError(f"a range of {len(extent)} bytes")
        try:
            source = self._reads.source_of(wire.text_of(request, "root"), blob)
        except WeightstreamError as error:
            self._refuse(error)
            return
        urgent = request.get("urgent") is True
        if self._arena is None:
            self._read_inline(source, blob, extent, urgent)
            return
        slot = self._arena.take(_SLOT_S)
        if slot is None:
            wire.send_head(self._sock, {"busy": True})
            return
        try:
            self._read_shared(source, blob, extent, urgent, slot)
        except BaseException:
            self._hang_up()  # before the slot is another's: the client may be copying from it
            raise
        finally:
            slot.release()

    def _read_shared(
        self, source: Source, blob: Blob, extent: Extent, urgent: bool, slot: Slot
    ) -> None:
        wire.send_head(self._sock, {"offset": slot.offset})
        teller = Teller(self._sock, self._sends, urgent)
        relay = Relay(teller.advance, urgent)
        self._fill(source, blob, extent.start, slot.view[: len(extent)], relay, teller)
        if self._sock.recv(1) != wire.FREE:
            raise wire.WireError("the client is gone")

    def _read_inline(self, source: Source, blob: Blob, extent: Extent, urgent: bool) -> None:
        if self._inline is None:
            self._inline = memoryview(allocate(_INLINE_BYTES))
        view, sent = self._inline[: len(extent)], 0

        def send(count: int) -> None:
            nonlocal sent
            metrics.AGENT_BYTES.inc(count)
            with self._sends:
                self._sock.sendall(wire.FRAME.pack(wire.BYTES, count))
                self._sock.sendall(view[sent : sent + count])
            sent += count

        wire.send_head(self._sock, {"inline": True})
        teller = Teller(self._sock, self._sends, urgent)
        self._fill(source, blob, extent.start, view, Relay(send, urgent), teller)

    def _fill(
        self,
        source: Source,
        blob: Blob,
        start: int,
        view: memoryview,
        relay: Relay,
        teller: Teller,
    ) -> None:
        self._relay, self._teller = relay, teller
        metrics.AGENT_RANGES.inc()
        try:
            source.read_into(blob, start, view, relay)
        except LoadCancelled:
            raise
        except WeightstreamError as error:
            teller.end(wire.BROKEN if error.transient else wire.FAILED, _shown(error))
        except Exception as error:  # a bug: the client reads on by itself
            log.exception("unexpected, reading %s", blob.uri)
            teller.end(wire.FAILED, _shown(error))
        else:
            teller.end(wire.END)
        finally:
            self._relay = self._teller = None

    def _refuse(self, error: WeightstreamError) -> None:
        wire.send_head(self._sock, {"error": _shown(error)})

    def _refute(self, request: dict[str, Any]) -> None:
        """Hear that a blob which was read here is not what the origin has."""
        blob = wire.blob_of(request)
        try:
            refute(self._reads.source_of(wire.text_of(request, "root"), blob), blob)
        except WeightstreamError as error:
            self._refuse(error)
            return
        wire.send_head(self._sock, {"refuted": True})

    # Plans

    def _plan(self, request: dict[str, Any]) -> None:
        """Hold a plan until the client closes the connection."""
        root = wire.text_of(request, "root")
        wanted = _wanted(request.get("wanted"))
        try:
            plan = self._reads.plan(root, wanted)
        except WeightstreamError as error:
            self._refuse(error)
            return
        try:
            wire.send_head(self._sock, {"planned": True})
            while self._is_silent():
                pass
        finally:
            plan.close()
        raise wire.WireError("the plan has ended")

    def _is_silent(self) -> bool:
        """Wait a while; False when the client says something or is gone."""
        try:
            self._sock.recv(1)
        except BlockingIOError:
            return True
        return False


def _wanted(values: Any) -> list[tuple[Blob, tuple[Extent, ...]]]:
    if not isinstance(values, list):
        raise wire.WireError("no plan")
    wanted = []
    for one in values:
        if not isinstance(one, dict) or not isinstance(one.get("extents"), list):
            raise wire.WireError("no plan")
        blob = wire.blob_of(one)
        wanted.append((blob, tuple(wire.extent_of(extent, blob) for extent in one["extents"])))
    return wanted


def _shown(error: Exception) -> str:
    text = str(error) if isinstance(error, WeightstreamError) else f"internal error: {error!r}"
    return mask_secrets(" ".join(text.split()))
