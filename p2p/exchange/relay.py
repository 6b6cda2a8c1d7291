"""One blob in the exchange of one node: its chunks on their way, who else has them, whom to ask.

Local readers and peers come to the same flights. What is in the node's store is served from there;
the exchange itself writes nothing into it: who asked for the bytes keeps them.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from weightstream.cachefs.blob import Blob, Extent
from weightstream.errors import UnavailableError, WeightstreamError
from weightstream.p2p.exchange.bringing import Bringer
from weightstream.p2p.exchange.carrier import Carried
from weightstream.p2p.exchange.client import PeerError
from weightstream.p2p.exchange.crowds import Crowd
from weightstream.p2p.exchange.flights import Flight, FlightState
from weightstream.p2p.exchange.here import Here
from weightstream.p2p.exchange.lanes import Hold
from weightstream.p2p.exchange.parts import Parts
from weightstream.p2p.exchange.server import HeldChunk
from weightstream.p2p.exchange.vouching import Vouched, ask_digests
from weightstream.p2p.members import Member
from weightstream.p2p.schedule import View, acting_home, route

_MOST_LOOKED = 1024


class Relay:
    """Thread-safe."""

    def __init__(self, blob: Blob, chunk_size: int, parts: Parts) -> None:
        self.blob = blob
        self.chunk_size = chunk_size
        self.n_chunks = -(-blob.size // chunk_size)
        self.crowd = Crowd(parts.me, parts.may_read(blob), blob.id, self.n_chunks)
        self.used_s = time.monotonic()
        self.asks_to_take = False
        self.holds = Hold()
        """What the other homes were told last."""
        self.is_mixed = False
        """A chunk came wrong from several peers: from now on each comes whole."""
        self._parts = parts
        self._next_given = 0
        self._gives_as: tuple[tuple[str, ...], frozenset[str]] = (), frozenset()
        """Who reads from the origin, and who of them is down: what is this node's to give."""
        self._first_missing = 0
        self._let_go: set[int] = set()
        """Chunks that were in memory once: others may have them, so nobody is to take them over."""
        self._lock, self._giving = threading.Lock(), threading.Lock()
        self.carrying = threading.Lock()
        """Held where `carried` is set."""
        self._flights: dict[int, Flight] = {}
        self.carried: Carried | None = None
        """The swarm of it, where this node takes part in one."""
        self._bringer = Bringer(parts, self.crowd, chunk_size, self.view, self._note_mixed)
        self._here = Here(blob, chunk_size, parts.store, lambda: self.carried)

    def chunk(self, i: int) -> Extent:
        """Return the bytes that chunk `i` covers."""
        start = i * self.chunk_size
        return Extent(start, min(start + self.chunk_size, self.blob.size))

    def alive(self) -> Mapping[str, Member]:
        """Return who answers now, by name."""
        return self._parts.neighbours.alive()

    # What is here

    def held_flags(self) -> bytes:
        """Return a byte per chunk: 1 where it is here, or coming from the origin."""
        flags = self._here.flags()
        with self._lock:
            for i, flight in self._flights.items():
                if flight.state is FlightState.LANDED or flight.from_origin:
                    flags[i] = 1
        return bytes(flags)

    def is_stored(self, i: int) -> bool:
        """Say whether chunk `i` is on this node's disk."""
        return self._here.has(i)

    def is_wanting(self, i: int) -> bool:
        """Say that chunk `i` is neither here nor on its way."""
        return self.flight(i) is None and not self.is_stored(i)

    def is_lacking(self, i: int) -> bool:
        """Say that no byte of chunk `i` is here."""
        flight = self.flight(i)
        return not self.is_stored(i) if flight is None else not flight.position

    def is_here(self, i: int) -> bool:
        """Say whether chunk `i` has landed, or is on disk."""
        return self._landed(i) is not None or self.is_stored(i)

    def held(self, i: int) -> HeldChunk | None:
        """Return chunk `i` of this node's disk, verified, to be sent."""
        return self._here.held(i, self.chunk(i))

    def read_stored(self, i: int, offset: int, into: memoryview) -> bool:
        """Read from disk; False when the chunk is not there."""
        return self._here.read(i, offset, into)

    def digest(self, i: int) -> bytes | None:
        """Return the BLAKE3 of chunk `i` if it is here."""
        landed = self._landed(i)
        return self._here.digest(i) if landed is None else landed.digest

    def stands_by(self, i: int) -> bool:
        """Say that this node passed on nothing wrong of chunk `i` in the swarm."""
        carried = self.carried
        return carried is not None and carried.stands_by(i)

    def published(self, i: int) -> bytes | None:
        """Return the published BLAKE3 of chunk `i`, if there is one."""
        return self._parts.digest_of(self.blob, self.chunk_size, i)

    def _landed(self, i: int) -> Flight | None:
        flight = self.flight(i)
        return flight if flight is not None and flight.state is FlightState.LANDED else None

    # The swarm

    def drop_carried(self) -> None:
        """Take no part in the swarm any more."""
        with self.carrying:  # until it is closed: the next one has the same name
            carried, self.carried = self.carried, None
            if carried is not None:
                carried.close()

    def is_carried(self, i: int) -> bool:
        """Say that the swarm brings chunk `i`."""
        carried = self.carried
        return carried is not None and carried.carries(i)

    @property
    def era(self) -> tuple[int, int]:
        """Return what changes when chunks may have to be brought by somebody else."""
        carried = self.carried
        return self.crowd.epoch, carried.era if carried is not None else 0

    @property
    def swarm_port(self) -> int:
        """Return where this node takes part in the blob's swarm; 0: it does not."""
        carrier = self._parts.carrier
        return carrier.port if carrier is not None and self.carried is not None else 0

    def meet(self, node: str, port: object) -> None:
        """Hear that a node takes part in the swarm; `port` as it said."""
        carried = self.carried
        if isinstance(port, int) and 0 < port < 1 << 16 and carried is not None:
            carried.meet(node, port)

    def stored_path(self) -> Path | None:
        """Return the store's file of it, if all of it is there."""
        return self._here.whole_path()

    def stored_chunks(self) -> Sequence[int]:
        """Return the chunks that are in the store."""
        return self._here.stored_chunks()

    def vouchers(self, i: int) -> list[str]:
        """Return who may know the hash of chunk `i`: who reads it from the origin first."""
        alive = self.alive()
        nodes = (self.reader(i), *self.crowd.rank(i), *sorted(self.crowd.having(i)))
        return [node for node in dict.fromkeys(nodes) if node in alive]

    def suppliers(self, i: int) -> frozenset[str]:
        """Return who gives chunk `i` to the swarm: who reads it from the origin, and who has it.
        Nobody when this node has taken it over: others wait for it."""
        if self.crowd.taker(i) == self._parts.me:
            return frozenset()
        return self.crowd.having(i) | {self.reader(i)}

    def ask_digests(self, node: str, chunks: Iterable[int]) -> Vouched:
        """Return what a member vouches for; raises `PeerError`."""
        member = self.alive().get(node)
        if member is None:
            raise PeerError(f"peer {node} is gone")
        return ask_digests(self._parts.client, member, self.blob.id, self.chunk_size, chunks)

    def dawdle(self, node: str) -> None:
        """Take a node for slow for a while: the swarm waits for what it alone has."""
        self._parts.neighbours.dawdle(node)

    def ban(self, node: str) -> None:
        """Never ask a node again."""
        self._parts.neighbours.ban(node)

    def _offer(self, flight: Flight) -> None:
        carried = self.carried
        if carried is not None:
            carried.offer(flight)

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
            flight = self._flights[i] = Flight(self.blob, i, self.chunk(i), self._offer)
            return flight, True

    def board_own(self, i: int) -> Flight | None:
        """Return a new flight of chunk `i` for this node's gate; None when it is on its way."""
        flight, new = self.board(i)
        if not new:
            return None
        if self.crowd.taker(i) in (None, self._parts.me):
            return flight
        self.start(flight)  # it was given away a moment ago
        return None

    def give_away(self, taker: str) -> int | None:
        """Give the first chunk of this node's that it has not begun to `taker`; return which."""
        if self.crowd.is_refuted:  # what it reads for itself others read as well
            return None
        with self._giving:
            return self._give_next(taker)

    def _give_next(self, taker: str) -> int | None:
        view = self.view()
        gives_as = view.homes.order, view.down
        if gives_as != self._gives_as:
            self._gives_as, self._next_given = gives_as, 0
        while self._next_given < self.n_chunks:
            i = self._next_given
            if acting_home(view, i) == self._parts.me and self._give_away(i, taker):
                return i
            self._next_given += 1
        return None

    def _give_away(self, i: int, taker: str) -> bool:
        if self.crowd.taker(i) is not None or i in self._let_go or self.is_stored(i):
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
                target=self._bringer.bring, args=(flight,), daemon=True, name="weightstream-bring"
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

    def reader(self, i: int) -> str:
        """Return who reads chunk `i` from the origin: who has taken it over, else its home."""
        return self.taker(i) or self.crowd.home(i)

    def readers(self) -> set[str]:
        """Return who else may still read it from the origin: whose chunks have not all come. Looks
        at the first that are missing only."""
        view, others = self.view(), len(self.crowd.nodes) - 1
        found = set[str]()
        for i in self._missing():
            if len(found) >= others:
                break
            if (node := self.taker(i) or acting_home(view, i)) != self._parts.me:
                found.add(node)
        return found

    def is_last(self, chunk: int) -> bool:
        """Say that this node reads nothing after `chunk`, which it reads now, and that half of the
        others have nothing left to give: their links are idle."""
        if 2 * (len(self.readers()) + 1) > len(self.crowd.nodes):
            return False
        if self.n_chunks - self._first_missing > _MOST_LOOKED:
            return False  # it may be, but there is much to come
        view, me = self.view(), self._parts.me
        more = (i for i in self._missing() if i != chunk)
        return all((self.taker(i) or acting_home(view, i)) != me for i in more)

    def _missing(self) -> Iterator[int]:
        """Yield what has not come, of the first that may not have."""
        first = self._first_missing
        while first < self.n_chunks and self._has_come(first):
            first += 1
        self._first_missing = first
        last = min(first + _MOST_LOOKED, self.n_chunks)
        return (i for i in range(first, last) if not self._has_come(i))

    def _has_come(self, i: int) -> bool:
        return self.is_here(i) or i in self._let_go

    def forget(self, flight: Flight) -> None:
        """Hear that a flight's memory goes."""
        with self._lock:
            if self._flights.get(flight.chunk) is flight:
                del self._flights[flight.chunk]
                self._let_go.add(flight.chunk)

    def flights(self) -> list[Flight]:
        """Return what is on its way or landed."""
        with self._lock:
            return list(self._flights.values())

    def rest(self) -> None:
        """Say that no plan wants anything of it any more."""
        for flight in self.flights():
            flight.unread = False

    def refute(self) -> None:
        """Let go of what came from peers, and read it from the origin."""
        self.crowd.refute()
        self.drop_carried()
        doubtful = [flight for flight in self.flights() if not flight.from_origin]
        error = UnavailableError(f"{self.blob.uri} came wrong from peers")
        for flight in doubtful:
            self._parts.shelf.discard(flight)
            flight.fail(error)

    def fail(self, error: WeightstreamError) -> None:
        """End what is on its way."""
        for flight in self.flights():
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
        carried = self.carried
        if new:
            if route(self.view(urgent), i).is_own:
                self.want_own(flight, urgent)
            elif carried is not None and carried.carries(i) and not urgent:
                carried.park(flight)
            else:
                flight.urgent = urgent
                self.start(flight)
        elif urgent:
            self.hurry(flight)
        return flight

    def start(self, flight: Flight) -> None:
        """Bring a flight on a thread of its own."""
        flight.is_parked = False
        threading.Thread(
            target=self.bring, args=(flight,), daemon=True, name="weightstream-bring"
        ).start()

    def hurry(self, flight: Flight) -> None:
        """A reader waits for it, and says so again as long as it does: bring it before bulk."""
        if flight.urgent:
            return
        if flight.is_parked:
            flight.urgent = True
            self.start(flight)
        elif not flight.is_at_gate:
            flight.hurry()
        elif not flight.is_sent_ahead:
            flight.is_sent_ahead = flight.is_hurried = True
            self._parts.gate.hurry(flight)

    def hurry_running(self, extent: Extent) -> None:
        """A reader waits for these bytes: bring what is on its way of them before bulk."""
        for i in range(extent.start // self.chunk_size, -(-extent.stop // self.chunk_size)):
            flight = self.flight(i)
            if flight is not None and not flight.is_over:
                self.hurry(flight)

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

    def bring(self, flight: Flight) -> None:
        """Bring a chunk from whoever gives it, on this thread; it lands, fails, or is queued."""
        first = route(self.view(flight.urgent), flight.chunk)
        if first.is_own:
            self._parts.gate.want(flight)
        elif flight.claim():
            self._bringer.bring(flight)

    def _note_mixed(self) -> None:
        self.is_mixed = True

    def bring_held(self, flight: Flight) -> bool:
        """See `Bringer.bring_held`."""
        return self._bringer.bring_held(flight)

    def close(self) -> None:
        """Let go of what is on disk."""
        self.drop_carried()
        self._here.close()
