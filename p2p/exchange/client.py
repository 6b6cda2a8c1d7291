"""Asks peers: for chunks, and who else has or loads a blob."""

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from weightstream.cachefs.blob import Blob
from weightstream.errors import UnavailableError
from weightstream.p2p.exchange.lanes import Lanes
from weightstream.p2p.exchange.paces import Paces
from weightstream.p2p.exchange.windows import BULK_BYTES, FAULT_BYTES, receive_window
from weightstream.p2p.exchange.wire import Channel, Head, WireError, request
from weightstream.p2p.identity import PEER_NAME, Identity
from weightstream.p2p.members import Member

DIGEST_BYTES = 32
CONNECT_S = 0.5
SILENCE_S = 1.0
"""A peer that waits for bytes says so four times a second; a body may pause twice as long."""
_DIGEST_S = 5.0
"""The peer checks the chunk before it vouches for it."""
_IDLE_CONNECTIONS = 16
_REFUSAL_BYTES = 4 << 10


class PeerError(UnavailableError):
    """A peer did not answer, or broke off."""


class AbsentError(PeerError):
    """The peer neither has the chunk nor can get it, or serves nobody now."""


class BrokenOffError(PeerError):
    """The peer ended the connection in the midst of a chunk: it is gone, or it has begun the chunk
    anew itself, because what it was passing on was wrong."""


class ElsewhereError(PeerError):
    """The peer takes another node for the chunk's home."""

    def __init__(self, message: str, node: str) -> None:
        super().__init__(message)
        self.node = node


class Sink(Protocol):
    """Who receives a chunk."""

    @property
    def is_hurried(self) -> bool:
        """Say that a reader has come to wait for bulk: other bulk gives way to it from now on."""
        ...

    def began(self, interrupt: Callable[[], None]) -> None:
        """Hear that the peer is asked for bulk, and how to end the wait for it."""
        ...

    def ended(self) -> None:
        """Hear that the answer is over, whatever it was."""
        ...

    def advance(self, count: int) -> None:
        """Hear that the next bytes are there; may raise to break off."""
        ...

    def waiting(self, chain: tuple[str, ...], progress: int) -> None:
        """Hear that the peer waits for bytes itself, through these nodes; may raise.

        `progress` counts what it has got of anything.
        """
        ...


@dataclass(frozen=True, slots=True)
class ChunkName:
    """What peers call a chunk."""

    blob: Blob
    chunk_size: int
    chunk: int

    @property
    def path(self) -> str:
        """Return its path in requests."""
        return f"/v1/chunk/{self.blob.id}/{self.chunk_size}/{self.chunk}"


class PeerClient:
    """Connections to every peer, kept alive. Thread-safe."""

    def __init__(self, identity: Identity, lanes: Lanes) -> None:
        self.paces = Paces()
        self.received_bytes = 0
        self._identity = identity
        self._lanes = lanes
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, int], list[Channel]] = {}
        self._busy: set[Channel] = set()
        self._round_trips_s: dict[tuple[str, int], float] = {}
        self._closed = False

    def fetch(
        self,
        member: Member,
        name: ChunkName,
        into: memoryview,
        sink: Sink,
        fault: bool,
        insist: bool,
    ) -> bytes:
        """Read a chunk into `into`; return the BLAKE3 that the peer says it has. Not checked here.

        With `insist` the peer is to get the chunk even if it takes another for its home. Raises
        `PeerError`; what `sink` raises goes through.
        """
        headers = {"Priority": "fault" if fault else "bulk"} | ({"Stand-In": "1"} if insist else {})
        with self._asking(member, "GET", name.path, headers) as channel:
            if fault:
                channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, FAULT_BYTES)
            else:
                self._set_window(member, channel)
                sink.began(channel.shut)
            try:
                return self._receive(channel, member, name, into, sink, fault)
            finally:
                sink.ended()

    def fetch_part(
        self, member: Member, name: ChunkName, start: int, into: memoryview, sink: Sink
    ) -> None:
        """Read what a member has, or is about to have, of a chunk from `start` on. It says nothing
        of whether that is right. Raises `PeerError`; what `sink` raises goes through."""
        headers = {"Priority": "bulk", "Range": f"bytes={start}-{start + len(into) - 1}"}
        with self._asking(member, "GET", name.path, headers) as channel:
            self._set_window(member, channel)
            self._await_body(channel, member, name, sink, 206, len(into))
            self._read_body(channel, member, into, sink, fault=False)

    def _receive(
        self,
        channel: Channel,
        member: Member,
        name: ChunkName,
        into: memoryview,
        sink: Sink,
        fault: bool,
    ) -> bytes:
        self._await_body(channel, member, name, sink, 200, len(into) + DIGEST_BYTES)
        self._read_body(channel, member, into, sink, fault)
        digest = bytearray(DIGEST_BYTES)
        channel.set_timeouts(_DIGEST_S)
        with _breaking_off(member):
            channel.read_body(memoryview(digest), lambda count: None)
        return bytes(digest)

    def _await_body(
        self, channel: Channel, member: Member, name: ChunkName, sink: Sink, status: int, count: int
    ) -> None:
        head = self._wait_head(channel, sink)
        if head.status != status:
            raise _refusal(member, name, head, channel)
        if head.length != count:
            raise WireError(f"{head.length} bytes where {count} were asked for")
        channel.set_timeouts(2 * SILENCE_S)

    def _read_body(
        self, channel: Channel, member: Member, into: memoryview, sink: Sink, fault: bool
    ) -> None:
        with _breaking_off(member), self.paces.asked(member.node), contextlib.ExitStack() as lane:
            if fault:
                lane.enter_context(self._lanes.fault())
            channel.read_body(into, self._advance(member.node, channel, sink, lane, fault))

    def tell(self, member: Member, path: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """Post a JSON message; return the answer."""
        body = json.dumps(message).encode()
        headers = {"Content-Type": "application/json"}
        with self._asking(member, "POST", path, headers, body) as channel:
            head = channel.read_head()
            if head is None:
                raise WireError("closed without an answer")
            found = channel.read_json(head.length)
            if head.status >= 300:
                raise WireError(f"{path} answered {head.status}")
            return found

    def close(self) -> None:
        """Close every connection; whoever waits on one fails."""
        with self._lock:
            self._closed = True
            channels = [*self._busy, *(c for idle in self._idle.values() for c in idle)]
            self._idle.clear()
        for channel in channels:
            channel.close()

    def _advance(
        self, node: str, channel: Channel, sink: Sink, lane: contextlib.ExitStack, fault: bool
    ) -> Callable[[int], None]:
        goes_first = fault

        def advance(count: int) -> None:
            nonlocal goes_first
            self.paces.got(node, count)
            self.received_bytes += count  # threads may lose one another's: it only must grow
            sink.advance(count)
            if sink.is_hurried and not goes_first:
                goes_first = True
                lane.enter_context(self._lanes.fault())
                channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, FAULT_BYTES)
            if goes_first:
                self._lanes.moves()
            else:
                self._lanes.give_way()

        return advance

    def _set_window(self, member: Member, channel: Channel) -> None:
        """Bound what may be on its way; see `windows`."""
        place = member.host, member.port
        shortest_s = min(channel.round_trip_s, self._round_trips_s.get(place, 1.0))
        self._round_trips_s[place] = shortest_s  # of one that began under load: the queue's
        window = BULK_BYTES
        if self._lanes.sees_faults:
            rate_bytes_s, connections = self.paces.sending()
            window = receive_window(
                rate_bytes_s, connections + 1, shortest_s, channel.segment_bytes
            )
        channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)

    @staticmethod
    def _wait_head(channel: Channel, sink: Sink) -> Head:
        while True:
            head = channel.read_head()
            if head is None:
                raise WireError("closed without an answer")
            if head.status != 102:
                return head
            chain = tuple(filter(None, head.headers.get("waits", "").split(",")))
            sink.waiting(chain, head.number("progress"))

    @contextlib.contextmanager
    def _asking(
        self, member: Member, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
    ) -> Iterator[Channel]:
        """Send a request; the connection is kept if the block reads its whole answer."""
        channel = self._send(member, method, path, headers, body)
        kept = False
        try:
            yield channel
            kept = True
        except _Answered as refusal:
            kept = True
            raise refusal.error from None
        except (OSError, WireError) as error:
            raise _broken(member, error) from error
        finally:
            self._give_back(member, channel, kept)

    def _send(
        self, member: Member, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> Channel:
        """Send on a kept connection, or on a new one when the peer has closed it meanwhile."""
        signed = self._identity.sign(method, path)
        proof = {"Authorization": signed} if signed else {}
        own = {"Host": "peer", "Node": self._identity.node}
        message = request(method, path, {**own, **headers, **proof}, body)
        try:
            while (channel := self._take(member)) is not None:
                try:
                    channel.set_timeouts(SILENCE_S)
                    channel.sock.sendall(message)
                    return channel
                except OSError:
                    self._give_back(member, channel, kept=False)
            channel = self._connect(member)
            channel.sock.sendall(message)
            return channel
        except (OSError, ssl.SSLError) as error:
            raise _broken(member, error) from error

    def _take(self, member: Member) -> Channel | None:
        with self._lock:
            idle = self._idle.get((member.host, member.port))
            while idle:
                channel = idle.pop()
                if not _was_closed(channel):
                    self._busy.add(channel)
                    return channel
                channel.close()
            return None

    def _connect(self, member: Member) -> Channel:
        sock = socket.create_connection((member.host, member.port), CONNECT_S)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BULK_BYTES)
            context = self._identity.client_context()
            if context is not None:
                sock.settimeout(2 * SILENCE_S)
                sock = context.wrap_socket(sock, server_hostname=PEER_NAME)
        except BaseException:
            sock.close()
            raise
        channel = Channel(sock)
        channel.set_timeouts(SILENCE_S)
        with self._lock:
            if self._closed:
                channel.close()
                raise OSError("the exchange was closed")
            self._busy.add(channel)
        return channel

    def _give_back(self, member: Member, channel: Channel, kept: bool) -> None:
        with self._lock:
            self._busy.discard(channel)
            idle = self._idle.setdefault((member.host, member.port), [])
            if kept and not self._closed and len(idle) < _IDLE_CONNECTIONS:
                idle.append(channel)
                return
        channel.close()


class _Answered(Exception):
    """A refusal that was read to its end: the connection is good."""

    def __init__(self, error: PeerError) -> None:
        self.error = error


@contextlib.contextmanager
def _breaking_off(member: Member) -> Iterator[None]:
    try:
        yield
    except (WireError, ConnectionError, ssl.SSLError) as error:
        raise BrokenOffError(str(_broken(member, error))) from error


def _broken(member: Member, error: Exception) -> PeerError:
    cause = "silent" if isinstance(error, BlockingIOError | TimeoutError) else str(error)
    return PeerError(f"peer {member.node} at {member.host}:{member.port}: {cause}")


def _refusal(member: Member, name: ChunkName, head: Head, channel: Channel) -> _Answered:
    if head.length > _REFUSAL_BYTES:
        raise WireError(f"{head.status} with {head.length} bytes")
    channel.read_json(head.length)
    said = f"peer {member.node}: {name.blob.uri} chunk {name.chunk}: {head.status}"
    if head.status == 307 and (node := head.headers.get("node")):
        return _Answered(ElsewhereError(f"{said}: {node} is its home", node))
    if head.status in (404, 503):
        return _Answered(AbsentError(said))
    return _Answered(PeerError(said))


def _was_closed(channel: Channel) -> bool:
    """Say whether the peer closed an idle connection, or sent what nobody asked for."""
    if channel.sock.fileno() < 0:
        return True
    try:
        channel.sock.setblocking(False)
        early = socket.socket.recv(channel.sock, 1, socket.MSG_PEEK)
    except (BlockingIOError, ssl.SSLWantReadError):
        return False
    except OSError:
        return True
    return not early or channel.is_plain  # TLS 1.3: a session ticket that nobody has read yet
