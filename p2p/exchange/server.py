"""The exchange's server: a thread per connection, blocking sockets.

Threads and not an event loop, because the work is the kernel's (sendfile, TLS): measured, 1 GiB to
one client on 2 cores, threads with TLS sent 600 MB/s at 1.0 CPU s/GB where asyncio's TLS sent 130
at 7. What clients do wrong costs them their connection and nobody else anything: heads are bounded
in bytes and time, idle connections in time, connections in number.
"""

import contextlib
import json
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from weightstream import metrics
from weightstream.errors import UsageError, WeightstreamError
from weightstream.p2p.exchange.client import SILENCE_S
from weightstream.p2p.exchange.flights import Flight
from weightstream.p2p.exchange.lanes import Lanes
from weightstream.p2p.exchange.wire import Channel, Head, WireError, answer, processing
from weightstream.p2p.identity import Identity

log = logging.getLogger(__name__)

_HEARTBEAT_S = SILENCE_S / 4
_IDLE_S = 60.0
_HANDSHAKE_S = 5.0
_SEND_S = 20.0
_MOST_CONNECTIONS = 1024
_PIECE_BYTES = 256 << 10
_DRAIN_S = 0.1
"""Bulk waits for so long until a fault's bytes have arrived: they share a queue."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How a peer asks for a chunk."""

    fault: bool
    insist: bool
    """It is to be got, whoever is its home."""
    node: str
    """Who asks."""


class Held(Protocol):
    """A verified chunk in the store; to be closed."""

    digest: bytes
    length: int

    def send(
        self,
        channel: Channel,
        give_way: Callable[[], None],
        part: tuple[int, int] | None = None,
    ) -> None:
        """Send its bytes, or those of a part: start and stop."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Home(Protocol):
    """What a server can give: the exchange."""

    def hello(self) -> Mapping[str, Any]:
        """Return who this is."""
        ...

    def joined(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Hear that a node loads a blob; raises WireError for a message that makes no sense."""
        ...

    def digests(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the hashes of chunks that this node vouches for; raises WireError."""
        ...

    def progress(self) -> int:
        """Return how many bytes it has got so far, of whatever."""
        ...

    def take(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give a chunk away that was not begun; raises WireError for a message without sense."""
        ...

    def left(self, message: Mapping[str, Any]) -> None:
        """Hear that a node is about to end."""
        ...

    def give(
        self, blob_id: str, chunk_size: int, chunk: int, asked: "Asked"
    ) -> Flight | Held | str | None:
        """Return a chunk on its way or in the store, or the node to ask instead, or None."""
        ...

    def give_part(self, blob_id: str, chunk_size: int, chunk: int) -> Flight | Held | None:
        """Return a chunk on its way or in the store; nothing is begun for it."""
        ...

    def is_late(self, flight: Flight) -> bool:
        """Say that what is still being sent of it is all that this node has left to do, or that
        others have time to do some of it."""
        ...

    def hold(self, message: Mapping[str, Any]) -> None:
        """Hear that another home reads a fault; raises WireError for a message without sense."""
        ...

    def scatter(self, flight: Flight, receivers: tuple[str, ...]) -> None:
        """Have receivers share the rest of a chunk among themselves; returns at once."""
        ...

    def scattered(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Hear that this node is one of them; raises WireError for a message without sense."""
        ...


class Server:
    """Listens from the start; close it."""

    def __init__(self, listen: str, home: Home, identity: Identity, lanes: Lanes) -> None:
        self._home = home
        self._identity = identity
        self._lanes = lanes
        self._tls = identity.server_context()
        self._socket = _listen(listen)
        self.port: int = self._socket.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True, name="weightstream-peers").start()

    def close(self) -> None:
        """End every connection."""
        with self._lock:
            self._closed = True
            open_ones = list(self._open)
        for sock in (self._socket, *open_ones):
            _shut(sock)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                continue  # the client was gone already, or this process is out of descriptors
            with self._lock:
                full = self._closed or len(self._open) >= _MOST_CONNECTIONS
                if not full:
                    self._open.add(sock)
            if full:
                _shut(sock)
                continue
            threading.Thread(
                target=self._talk, args=(sock,), daemon=True, name="weightstream-peer"
            ).start()

    def _talk(self, sock: socket.socket) -> None:
        kept = sock
        try:
            sock.settimeout(_HANDSHAKE_S)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
                with self._lock:
                    self._open.add(sock)
            channel = Channel(sock)
            channel.set_timeouts(_IDLE_S)
            while not self._closed and (head := channel.read_head()) is not None:
                self._answer(channel, head)
                channel.set_timeouts(_IDLE_S)
        except (OSError, WireError, ssl.SSLError) as error:
            log.debug("a peer's connection ended: %s", error)
        except Exception:
            log.exception("a peer's connection ended")
        finally:
            with self._lock:
                self._open.discard(kept)
                self._open.discard(sock)
            _shut(sock)

    def _answer(self, channel: Channel, head: Head) -> None:
        parts = head.first.split(" ")
        if len(parts) != 3 or parts[2] != "HTTP/1.1":
            raise WireError(f"no request of HTTP/1.1: {head.first[:60]!r}")
        method, path = parts[0], parts[1]
        channel.set_timeouts(_SEND_S)
        refusal = self._identity.refusal(head.headers.get("authorization"), method, path)
        if refusal is not None:
            log.info("refused a peer's request: %s", refusal)
            channel.sock.sendall(answer(401, "Unauthorized", {}, 0))
            raise WireError(refusal)
        if method == "GET" and path == "/v1/hello":
            _send_json(channel, self._home.hello())
        elif method == "POST" and path == "/v1/join":
            _send_json(channel, self._home.joined(channel.read_json(head.length)))
        elif method == "POST" and path == "/v1/digests":
            _send_json(channel, self._home.digests(channel.read_json(head.length)))
        elif method == "POST" and path == "/v1/take":
            _send_json(channel, self._home.take(channel.read_json(head.length)))
        elif method == "POST" and path == "/v1/scatter":
            _send_json(channel, self._home.scattered(channel.read_json(head.length)))
        elif method == "POST" and path == "/v1/hold":
            self._home.hold(channel.read_json(head.length))
            _send_json(channel, {})
        elif method == "POST" and path == "/v1/leave":
            self._home.left(channel.read_json(head.length))
            _send_json(channel, {})
        elif method == "GET" and path.startswith("/v1/chunk/"):
            self._answer_chunk(channel, head, path)
        else:
            channel.sock.sendall(answer(404, "Not Found", {}, 0))
            raise WireError(f"nothing at {path[:60]!r}")

    def _answer_chunk(self, channel: Channel, head: Head, path: str) -> None:
        blob_id, chunk_size, chunk = _chunk_of(path)
        if "range" in head.headers:
            start, stop = _part_of(head.headers["range"], chunk_size)
            self._answer_part(
                channel, self._home.give_part(blob_id, chunk_size, chunk), start, stop
            )
            return
        fault = head.headers.get("priority") == "fault"
        asked = Asked(fault, head.headers.get("stand-in") == "1", head.headers.get("node", ""))
        found = self._home.give(blob_id, chunk_size, chunk, asked)
        if found is None:
            channel.sock.sendall(answer(404, "Not Found", {}, 0))
        elif isinstance(found, str):
            _send_elsewhere(channel, found)
        elif isinstance(found, Flight):
            self._send_flight(channel, found, asked)
        else:
            self._send_held(channel, found, fault)

    def _send_held(self, channel: Channel, held: Held, fault: bool) -> None:
        try:
            head = answer(200, "OK", {}, held.length + len(held.digest))
            with self._turn(fault):
                channel.sock.sendall(head, *_more(channel))
                held.send(channel, self._lanes.moves if fault else self._lanes.give_way)
                channel.sock.sendall(held.digest)
                if fault:
                    self._lanes.moves()
                    channel.drain(_DRAIN_S)
            metrics.PEER_BYTES.labels("sent").inc(held.length)
        finally:
            held.close()

    def _answer_part(
        self, channel: Channel, found: Flight | Held | None, start: int, stop: int
    ) -> None:
        """Send a part of what is here, or is on its way here: unchecked, as bytes on their way are
        passed on."""
        if found is None:
            channel.sock.sendall(answer(404, "Not Found", {}, 0))
        elif isinstance(found, Flight):
            self._send_part(channel, found, start, stop)
        else:
            try:
                if stop > found.length:
                    raise WireError(f"no bytes up to {stop} in a chunk of {found.length}")
                channel.sock.sendall(answer(206, "Partial Content", {}, stop - start))
                found.send(channel, self._lanes.give_way, (start, stop))
                metrics.PEER_BYTES.labels("sent").inc(stop - start)
            finally:
                found.close()

    def _send_part(self, channel: Channel, flight: Flight, start: int, stop: int) -> None:
        if stop > len(flight.extent):
            raise WireError(f"no bytes up to {stop} in a chunk of {len(flight.extent)}")
        while not flight.wait_part(start, stop, _HEARTBEAT_S) and not flight.is_over:
            channel.sock.sendall(processing(flight.chain, self._home.progress()))
        slab = flight.hold()
        if slab is None:
            channel.sock.sendall(answer(503, "Service Unavailable", {}, 0))
            return
        try:
            channel.sock.sendall(answer(206, "Partial Content", {}, stop - start), *_more(channel))
            self._send_some(channel, slab.view, start, stop, fault=False)
        finally:
            slab.release()

    def _send_flight(self, channel: Channel, flight: Flight, asked: Asked) -> None:
        """Pass a chunk on as it arrives; its digest follows when it was found right."""
        total = len(flight.extent)
        count = self._await_first(channel, flight, asked.insist)
        if not count and flight.taker and not asked.insist:
            _send_elsewhere(channel, flight.taker)
            return
        generation = flight.generation
        slab = flight.hold() if count else None
        if slab is None:
            channel.sock.sendall(answer(503, "Service Unavailable", {}, 0))
            return
        passing = None if asked.fault else flight.passing.begin(asked.node)
        try:
            channel.sock.sendall(answer(200, "OK", {}, total + 32), *_more(channel))
            sent = 0
            while sent < total:
                with self._turn(asked.fault):
                    stop = min(count, sent + _PIECE_BYTES)
                    sent = self._send_some(channel, slab.view, sent, stop, asked.fault)
                if passing is not None:
                    flight.passing.sent(passing, sent)
                    self._help(flight)
                while sent < total and count <= sent:
                    count = flight.wait_beyond(sent, _SEND_S, local=False)
                    ended = count == sent and flight.is_over
                    if count < sent or ended or flight.generation != generation:
                        raise WireError(f"{flight.blob.uri} chunk {flight.chunk} failed here")
            over = flight.wait_over(_SEND_S)
            if not over or not flight.digest or flight.generation != generation:
                raise WireError(f"{flight.blob.uri} chunk {flight.chunk} was not right")
            channel.sock.sendall(flight.digest)
            if asked.fault:
                with self._lanes.fault():
                    channel.drain(_DRAIN_S)
        finally:
            if passing is not None:
                flight.passing.end(passing)
            slab.release()

    def _help(self, flight: Flight) -> None:
        """Have receivers share the rest of a chunk when this node's uplink is behind."""
        if not flight.passing.is_due():
            return
        receivers = flight.passing.scatter(flight.position)
        if receivers and self._home.is_late(flight) and flight.passing.tell(receivers):
            self._home.scatter(flight, receivers)

    def _await_first(self, channel: Channel, flight: Flight, insists: bool) -> int:
        """Wait for the first bytes, and say meanwhile that we live; 0 when it failed or was given
        away."""
        while True:
            count = flight.wait_first(_HEARTBEAT_S, insists)
            if count or flight.is_over or (flight.taker and not insists):
                return count
            channel.sock.sendall(processing(flight.chain, self._home.progress()))

    def _send_some(
        self, channel: Channel, view: memoryview, sent: int, count: int, fault: bool
    ) -> int:
        while sent < count:
            if fault:
                self._lanes.moves()
            else:
                self._lanes.give_way()
            step = min(_PIECE_BYTES, count - sent)
            channel.sock.sendall(view[sent : sent + step])
            metrics.PEER_BYTES.labels("sent").inc(step)
            sent += step
        return sent

    @contextlib.contextmanager
    def _turn(self, fault: bool) -> Iterator[None]:
        if not fault:
            yield
            return
        with self._lanes.fault():
            yield


def _more(channel: Channel) -> tuple[int, ...]:
    """Return the flag that keeps a head from becoming a packet of its own."""
    return (socket.MSG_MORE,) if channel.is_plain else ()


def _send_elsewhere(channel: Channel, node: str) -> None:
    channel.sock.sendall(answer(307, "Temporary Redirect", {"Node": node}, 0))


def _send_json(channel: Channel, message: Mapping[str, Any]) -> None:
    body = json.dumps(message).encode()
    channel.sock.sendall(answer(200, "OK", {"Content-Type": "application/json"}, len(body)) + body)


def _chunk_of(path: str) -> tuple[str, int, int]:
    parts = path.split("/")
    numbers = all(part.isascii() and part.isdigit() for part in parts[4:])
    if len(parts) != 6 or len(parts[3]) != 32 or not numbers:
        raise WireError(f"bad chunk name {path[:80]!r}")
    if any(len(p) > 12 for p in parts[4:]):
        raise WireError(f"bad chunk name {path[:80]!r}")
    return parts[3], int(parts[4]), int(parts[5])


def _part_of(text: str, chunk_size: int) -> tuple[int, int]:
    first, _, last = text.removeprefix("bytes=").partition("-")
    is_range = text.startswith("bytes=") and text.isascii() and first.isdigit() and last.isdigit()
    if not is_range or len(text) > 40:
        raise WireError(f"bad range {text[:40]!r}")
    start, stop = int(first), int(last) + 1
    if not start < stop <= chunk_size:
        raise WireError(f"bad range {text[:40]!r} of a chunk of {chunk_size}")
    return start, stop


def _listen(listen: str) -> socket.socket:
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit():
        raise UsageError(f"peer_listen {listen!r} is not of the form address:port")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=256)
    except OSError as error:
        raise WeightstreamError(f"cannot serve peers at {listen}: {error.strerror}") from error


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


class HeldChunk:
    """A chunk of a file: sent by sendfile where the connection is plain."""

    def __init__(self, fd: int, start: int, length: int, digest: bytes) -> None:
        self.digest = digest
        self.length = length
        self._fd = fd
        self._start = start

    def send(
        self,
        channel: Channel,
        give_way: Callable[[], None],
        part: tuple[int, int] | None = None,
    ) -> None:
        """See `Held.send`."""
        done, end = part or (0, self.length)
        buffer = None if channel.is_plain else memoryview(bytearray(_PIECE_BYTES))
        while done < end:
            give_way()
            step = min(_PIECE_BYTES, end - done)
            if buffer is None:
                count = os.sendfile(channel.sock.fileno(), self._fd, self._start + done, step)
            else:
                count = os.preadv(self._fd, [buffer[:step]], self._start + done)
                channel.sock.sendall(buffer[:count])
            if not count:
                raise WireError("the stored file ends early")
            done += count

    def close(self) -> None:
        """See `Held.close`."""
        os.close(self._fd)
