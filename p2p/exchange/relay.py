"""One blob in the exchange of one node: its chunks on their way, who else has them, whom to ask.

Local readers and peers come to the same flights. What is in the node's store is served from there;
the exchange itself writes nothing into it: who asked for the bytes keeps them.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from blake3 import blake3

from weightstream import metrics
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.cachefs.store.state import present_flags
from weightstream.errors import StoreError, UnavailableError, WeightstreamError
from weightstream.p2p.exchange.client import (
    AbsentError,
    ChunkName,
    ElsewhereError,
    PeerClient,
    PeerError,
)
from weightstream.p2p.exchange.crowds import Crowd
from weightstream.p2p.exchange.flights import Flight, FlightState, Shelf
from weightstream.p2p.exchange.gate import Gate
from weightstream.p2p.exchange.server import HeldChunk
from weightstream.p2p.exchange.sinks import (
    FlightSink,
    HurryError,
    SlowError,
    TakenError,
    WrongError,
)
from weightstream.p2p.members import Member
from weightstream.p2p.schedule import ORIGIN, View, is_slow, route

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5
_ROOM_S = 30.0
_TRIES = 8


class Neighbours:
    """Everybody else, as the whole exchange sees them. Thread-safe."""

    def __init__(self, members: Callable[[], tuple[Member, ...]], client: PeerClient) -> None:
        self._members = members
        self._client = client
        self._banned: set[str] = set()
        self._zones: dict[str, str] = {}

    def zones(self) -> Mapping[str, str]:
        """Return everybody's zone, also of those who are down: trees stay as they are."""
        self._zones.update({member.node: member.zone for member in self._members()})
        return self._zones

    def alive(self) -> Mapping[str, Member]:
        """Return who answers now, by name."""
        return {m.node: m for m in self._members() if m.node not in self._banned}

    def slow(self) -> frozenset[str]:
        """Return who gives far less than the others."""
        paces = self._client.paces.now()
        return frozenset(node for node in paces if is_slow(paces, node))

    def is_slow(self, node: str, times: float) -> bool:
        """Say that a node gives less than a `times`-th of what others give."""
        return is_slow(self._client.paces.now(), node, times)

    def ban(self, node: str) -> None:
        """Never ask a node again: it gave bytes that are not what it says."""
        self._banned.add(node)


@dataclass(frozen=True, slots=True)
class Parts:
    """What relays share."""

    me: str
    store: Store | None
    shelf: Shelf
    gate: Gate
    client: PeerClient
    neighbours: Neighbours
    suspect: Callable[[str, str], None]
    may_read: Callable[[Blob], bool]
    """Whether this node may read the blob's origin."""
    digest_of: Callable[[Blob, int, int], bytes | None]
    """The published hash of a chunk, if there is one."""


class Relay:
    """Thread-safe."""

    def __init__(self, blob: Blob, chunk_size: int, parts: Parts) -> None:
        self.blob = blob
        self.chunk_size = chunk_size
        self.n_chunks = -(-blob.size // chunk_size)
        self.crowd = Crowd(parts.me, parts.may_read(blob), blob.id, self.n_chunks)
        self.used_s = time.monotonic()
        self.asks_to_take = False
        self._parts = parts
        self._next_given = 0
        self._lock = threading.Lock()
        self._flights: dict[int, Flight] = {}
        self._stored: StoredBlob | None = None
        self._looked_s = 0.0

    def chunk(self, i: int) -> Extent:
        """Return the bytes that chunk `i` covers."""
        start = i * self.chunk_size
        return Extent(start, min(start + self.chunk_size, self.blob.size))

    # What is here

    def held_flags(self) -> bytes:
        """Return a byte per chunk: 1 where it is here, or coming from the origin."""
        stored = self._in_store()
        flags = bytearray(present_flags(stored.states())) if stored else bytearray(self.n_chunks)
        with self._lock:
            for i, flight in self._flights.items():
                if flight.state is FlightState.LANDED or flight.from_origin:
                    flags[i] = 1
        return bytes(flags)

    def is_stored(self, i: int) -> bool:
        """Say whether chunk `i` is in the store."""
        stored = self._in_store()
        return stored is not None and bool(present_flags(bytes([stored.state(i)]))[0])

    def is_wanting(self, i: int) -> bool:
        """Say that chunk `i` is neither here nor on its way."""
        with self._lock:
            flight = self._flights.get(i)
        if flight is not None and flight.state is not FlightState.FAILED:
            return False
        return not self.is_stored(i)

    def is_lacking(self, i: int) -> bool:
        """Say that no byte of chunk `i` is here."""
        with self._lock:
            flight = self._flights.get(i)
        if flight is not None and flight.state is not FlightState.FAILED:
            return not flight.position
        return not self.is_stored(i)

    def is_here(self, i: int) -> bool:
        """Say whether chunk `i` has landed, or is in the store."""
        with self._lock:
            flight = self._flights.get(i)
        return (flight is not None and flight.state is FlightState.LANDED) or self.is_stored(i)

    def held(self, i: int) -> HeldChunk | None:
        """Return chunk `i` of the store, verified, to be sent."""
        stored = self._in_store()
        if stored is None or not self.is_stored(i):
            return None
        try:
            if not stored.read_into(i, 0, memoryview(bytearray(1))):
                return None
            extent = self.chunk(i)
            return HeldChunk(stored.open_data(), extent.start, len(extent), stored.digest(i))
        except StoreError as error:
            log.debug("not served from the store: %s", error)
            return None

    def read_stored(self, i: int, offset: int, into: memoryview) -> bool:
        """Read from the store; False when the chunk is not there."""
        stored = self._in_store()
        return stored is not None and self.is_stored(i) and stored.read_into(i, offset, into)

    def _in_store(self) -> StoredBlob | None:
        store, now_s = self._parts.store, time.monotonic()
        if self._stored is None and store is not None and now_s >= self._looked_s:
            self._looked_s = now_s + _LOOK_AGAIN_S
            try:
                found = store.find_blob(self.blob)
            except StoreError as error:
                log.debug("no store behind %s: %s", self.blob.uri, error)
                return None
            if found is not None and found.chunk_size != self.chunk_size:
                found.close()
                found = None
            self._stored = found
        return self._stored

    # Flights

    def flight(self, i: int) -> Flight | None:
        """Return chunk `i` on its way or landed."""
        with self._lock:
            flight = self._flights.get(i)
        return None if flight is None or flight.state is FlightState.FAILED else flight

    def board(self, i: int) -> tuple[Flight, bool]:
        """Return the flight of chunk `i`, and whether it is new and the caller's to start."""
        with self._lock:
            flight = self._flights.get(i)
            if flight is not None and flight.state is not FlightState.FAILED:
                return flight, False
            flight = self._flights[i] = Flight(self.blob, i, self.chunk(i))
            return flight, True

    def board_own(self, i: int) -> Flight | None:
        """Return a new flight of chunk `i` for this node's gate; None when it is on its way."""
        flight, new = self.board(i)
        if not new:
            return None
        if self.crowd.taker(i) in (None, self._parts.me):
            return flight
        self._start(flight)  # it was given away a moment ago
        return None

    def give_away(self, taker: str) -> int | None:
        """Give the first chunk of this node's that it has not begun to `taker`; return which."""
        while self._next_given < self.n_chunks:
            i = self._next_given
            if self.crowd.home(i) == self._parts.me and self._give_away(i, taker):
                return i
            self._next_given += 1
        return None

    def _give_away(self, i: int, taker: str) -> bool:
        if self.crowd.taker(i) is not None or self.is_stored(i):
            return False
        with self._lock:
            flight = self._flights.get(i)
            if flight is not None and flight.state is FlightState.FAILED:
                flight = None
            if flight is not None and not flight.give_away(taker):
                return False
            self.crowd.move(i, taker)
        if flight is not None:
            threading.Thread(
                target=self._bring_claimed, args=(flight,), daemon=True, name="weightstream-bring"
            ).start()
        return True

    def is_taking(self, i: int) -> bool:
        """Say that chunk `i` was given to this node, or may be what it is about to be given."""
        return self.asks_to_take or self.crowd.taker(i) == self._parts.me

    def taker(self, i: int) -> str | None:
        """Return who has taken chunk `i` over and answers; this node may be it."""
        node = self.crowd.taker(i)
        is_there = node == self._parts.me or node in self._parts.neighbours.alive()
        return node if is_there else None

    def forget(self, flight: Flight) -> None:
        """Hear that a flight's memory goes."""
        with self._lock:
            if self._flights.get(flight.chunk) is flight:
                del self._flights[flight.chunk]

    def rest(self) -> None:
        """Say that no plan wants anything of it any more."""
        with self._lock:
            for flight in self._flights.values():
                flight.unread = False

    def refute(self) -> None:
        """Let go of what came from peers, and read it from the origin."""
        self.crowd.refute()
        with self._lock:
            doubtful = [flight for flight in self._flights.values() if not flight.from_origin]
        error = UnavailableError(f"{self.blob.uri} came wrong from peers")
        for flight in doubtful:
            self._parts.shelf.discard(flight)
            flight.fail(error)

    def fail(self, error: WeightstreamError) -> None:
        """End what is on its way."""
        with self._lock:
            flights = list(self._flights.values())
        for flight in flights:
            flight.fail(error)

    @property
    def has_begun(self) -> bool:
        """Say that this node has, or is reading, any of it."""
        return any(self.held_flags())

    @property
    def is_idle(self) -> bool:
        """Say that nothing is in memory."""
        return not self._flights

    def want(self, i: int, urgent: bool) -> Flight:
        """Return the flight of chunk `i`; begins it, whoever is to bring it."""
        self.used_s = time.monotonic()
        flight, new = self.board(i)
        flight.is_needed = True
        if new:
            if route(self.view(urgent), i).is_own:
                self.want_own(flight, urgent)
            else:
                flight.urgent = urgent
                self._start(flight)
        elif urgent:
            self.hurry(flight)
        return flight

    def _start(self, flight: Flight) -> None:
        threading.Thread(
            target=self.bring, args=(flight,), daemon=True, name="weightstream-bring"
        ).start()

    def hurry(self, flight: Flight) -> None:
        """A reader waits for it: bring it before bulk, anew if it runs as bulk."""
        if flight.is_hurried or flight.urgent:
            return
        if flight.is_at_gate:
            flight.is_hurried = True
            self._parts.gate.hurry(flight)
        elif flight.position < len(flight.extent) // 2:
            flight.hurry()

    def want_own(self, flight: Flight, urgent: bool) -> None:
        """Have this node's gate bring a flight."""
        if urgent:
            self._parts.gate.hurry(flight)
        else:
            self._parts.gate.want(flight)

    def view(self, urgent: bool = False, left: frozenset[str] = frozenset()) -> View:
        """Return what the schedule decides by; see `Crowd.view`."""
        alive = self._parts.neighbours.alive()
        known = set(self.crowd.nodes) | set(self.crowd.holders)
        down = frozenset(node for node in known if node != self._parts.me and node not in alive)
        neighbours = self._parts.neighbours
        return self.crowd.view(down, neighbours.slow(), neighbours.zones(), urgent, left)

    # Bringing from peers

    def bring(self, flight: Flight) -> None:
        """Bring a chunk from whoever gives it, on this thread; it lands, fails, or is queued."""
        first = route(self.view(flight.urgent), flight.chunk)
        if first.is_own:
            self._parts.gate.want(flight)
        elif flight.claim():
            self._bring_claimed(flight)

    def _bring_claimed(self, flight: Flight) -> None:
        try:
            self._bring(flight)
        except WeightstreamError as error:
            flight.fail(error)
        except Exception as error:
            log.exception("unexpected, at %s chunk %d", self.blob.uri, flight.chunk)
            flight.fail(WeightstreamError(f"{self.blob.uri} chunk {flight.chunk}: {error!r}"))

    def _bring(self, flight: Flight) -> None:
        slab = flight.slab or self._parts.shelf.take(flight, _ROOM_S)
        if slab is None:
            raise UnavailableError(f"{self.blob.uri} {flight.extent}: no memory for it")
        flight.begin(slab)
        with flight.memory() as view:
            digest = self._from_peers(flight, view)
        flight.asking, flight.chain = "", ()
        if digest is None:
            self._parts.gate.resort(flight)
            return
        if flight.land(digest):
            self._parts.shelf.put(flight)

    def _from_peers(self, flight: Flight, view: memoryview) -> bytes | None:
        """Ask one after the other; None when it is the origin's turn."""
        tried: dict[str, int] = {}
        left: set[str] = set()  # because they were slow: whoever stands in for them, may be we
        named = namer = ""
        for _ in range(_TRIES):
            way = route(self.view(flight.urgent, frozenset(left)), flight.chunk)
            node = named or next((ask for ask in way.asks if not tried.get(ask)), ORIGIN)
            insist = node not in way.relays and node != self.crowd.home(flight.chunk)
            insist |= bool(named or node == namer)
            if not named and namer and tried[namer] < 2:  # whom it named does not give it
                node, insist = namer, True
            named = ""
            member = self._parts.neighbours.alive().get(node)
            tried[node] = tried.get(node, 0) + 1
            if node in (ORIGIN, self._parts.me):
                return None
            if member is None:
                continue
            try:
                return self._ask(flight, member, view, insist)
            except ElsewhereError as other:
                named = other.node if tried.get(other.node, 0) < 2 else ""
                namer = node
            except TakenError:
                return None
            except HurryError:
                flight.urgent, tried[node] = True, tried[node] - 1
            except AbsentError as error:
                log.debug("%s", error)
                self.crowd.note(node, flight.chunk, False)
            except PeerError as error:
                log.info("%s; asking somebody else for chunk %d", error, flight.chunk)
                metrics.PEER_FAILURES.labels("broken").inc()
                if isinstance(error, SlowError):
                    namer = ""
                    left.add(node)
                else:
                    self._parts.suspect(node, str(error))
            flight.restart()
        return None

    def _ask(self, flight: Flight, member: Member, view: memoryview, insist: bool) -> bytes:
        name = ChunkName(self.blob, self.chunk_size, flight.chunk)
        flight.asking, flight.chain = member.node, (member.node,)
        if self.crowd.taker(flight.chunk) == self._parts.me:
            raise TakenError("it is this node's to read now")
        sink = FlightSink(flight, member.node, self._parts.me, self._parts.neighbours.is_slow)
        try:
            said = self._parts.client.fetch(member, name, view, sink, flight.urgent, insist)
        except PeerError as error:
            if flight.is_hurried and not flight.urgent:
                raise HurryError("a reader waits for it") from error
            raise
        self._check(flight, member, view, said)
        self.crowd.note(member.node, flight.chunk, True)
        metrics.PEER_BYTES.labels("received").inc(len(view))
        return said

    def _check(self, flight: Flight, member: Member, view: memoryview, said: bytes) -> None:
        """Compare what came with what the peer says it is, and with what was published."""
        found = blake3(view).digest()
        published = self._parts.digest_of(self.blob, self.chunk_size, flight.chunk)
        if found == said:
            self._check_published(flight, member, said, published)
            return
        metrics.PEER_FAILURES.labels("wrong").inc()
        self._parts.neighbours.ban(member.node)
        where = f"{member.node} at {member.host}:{member.port}"
        text = f"peer {where} sent wrong bytes of {self.blob.uri} {flight.extent}: not asked again"
        log.warning("%s", text)
        raise WrongError(text)

    def _check_published(
        self, flight: Flight, member: Member, said: bytes, published: bytes | None
    ) -> None:
        """Refuse a chunk that is not what was published. Its sender is not banned: whoever may
        write the manifest could have everybody banned with a wrong one. The origin decides."""
        if published in (None, said):
            return
        metrics.PEER_FAILURES.labels("unpublished").inc()
        what = f"{self.blob.uri} {flight.extent}"
        log.warning("%s of peer %s is not what was published", what, member.node)
        raise AbsentError(f"{what} of peer {member.node} is not what was published")

    def close(self) -> None:
        """Let go of the store's blob."""
        if self._stored is not None:
            self._stored.close()
