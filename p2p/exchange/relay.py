"""One blob in the exchange of one node: its chunks on their way, who else has them, whom to ask.

Local readers and peers come to the same flights. What is in the node's store is served from there;
the exchange itself writes nothing into it: who asked for the bytes keeps them.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from weightstream import metrics
from weightstream.cachefs.blob import Blob, Extent
from weightstream.errors import UnavailableError, WeightstreamError
from weightstream.p2p.exchange.carrier import Carried
from weightstream.p2p.exchange.client import (
    AbsentError,
    ChunkName,
    ElsewhereError,
    PeerError,
)
from weightstream.p2p.exchange.crowds import Crowd
from weightstream.p2p.exchange.flights import Flight, FlightState
from weightstream.p2p.exchange.here import Here
from weightstream.p2p.exchange.parts import Parts
from weightstream.p2p.exchange.server import HeldChunk
from weightstream.p2p.exchange.sinks import FlightSink, HurryError, SlowError, WrongError
from weightstream.p2p.exchange.vouching import Vouched, ask_digests
from weightstream.p2p.members import Member
from weightstream.p2p.schedule import ORIGIN, View, route

log = logging.getLogger(__name__)

_ROOM_S = 30.0
_TRIES = 8


class Relay:
    """Thread-safe."""

    def __init__(self, blob: Blob, chunk_size: int, parts: Parts) -> None:
        self.blob = blob
        self.chunk_size = chunk_size
        self.n_chunks = -(-blob.size // chunk_size)
        self.crowd = Crowd(parts.me, parts.may_read(blob), blob.id, self.n_chunks)
        self.used_s = time.monotonic()
        self._parts = parts
        self._lock = threading.Lock()
        self.carrying = threading.Lock()
        """Held where `carried` is set."""
        self._flights: dict[int, Flight] = {}
        self.carried: Carried | None = None
        """The swarm of it, where this node takes part in one."""
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
        """Return who may know the hash of chunk `i`: its home first."""
        alive = self.alive()
        having = sorted(self.crowd.having(i))
        return [node for node in dict.fromkeys((*self.crowd.rank(i), *having)) if node in alive]

    def ask_digests(self, node: str, chunks: Iterable[int]) -> Vouched:
        """Return what a member vouches for; raises `PeerError`."""
        member = self.alive().get(node)
        if member is None:
            raise PeerError(f"peer {node} is gone")
        return ask_digests(self._parts.client, member, self.blob.id, self.chunk_size, chunks)

    def dawdle(self, node: str) -> None:
        """Have others stand in for a node for a while: the swarm waits for what it alone has."""
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

    def forget(self, flight: Flight) -> None:
        """Hear that a flight's memory goes."""
        with self._lock:
            if self._flights.get(flight.chunk) is flight:
                del self._flights[flight.chunk]

    def flights(self) -> list[Flight]:
        """Return what is on its way or landed."""
        with self._lock:
            return list(self._flights.values())

    def rest(self) -> None:
        """Say that no plan wants anything of it any more."""
        for flight in self.flights():
            flight.unread = False

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
            if route(self.view(), i).is_own:
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
        """A reader waits for it: bring it before bulk, anew if it runs as bulk."""
        if flight.is_hurried or flight.urgent:
            return
        if flight.is_parked:
            flight.urgent = True
            self.start(flight)
            return
        if flight.is_at_gate:
            flight.is_hurried = True
            self._parts.gate.hurry(flight)
        elif flight.position < len(flight.extent) // 2:
            flight.is_hurried = True

    def want_own(self, flight: Flight, urgent: bool) -> None:
        """Have this node's gate bring a flight."""
        if urgent:
            self._parts.gate.hurry(flight)
        else:
            self._parts.gate.want(flight)

    def view(self) -> View:
        """Return what the schedule decides by."""
        alive = self._parts.neighbours.alive()
        known = set(self.crowd.nodes) | set(self.crowd.holders)
        down = frozenset(node for node in known if node != self._parts.me and node not in alive)
        neighbours = self._parts.neighbours
        return self.crowd.view(down, neighbours.slow(), neighbours.zones())

    # Bringing from peers

    def bring(self, flight: Flight) -> None:
        """Bring a chunk from whoever gives it, on this thread; it lands, fails, or is queued."""
        first = route(self.view(), flight.chunk)
        if first.is_own:
            self._parts.gate.want(flight)
            return
        if not flight.claim():
            return
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
        digest = self._from_peers(flight, slab.view)
        flight.asking, flight.chain = "", ()
        if digest is None:
            self._parts.gate.resort(flight)
            return
        flight.land(digest)
        self._parts.shelf.put(flight)

    def _from_peers(self, flight: Flight, view: memoryview) -> bytes | None:
        """Ask one after the other; None when it is the origin's turn."""
        tried: dict[str, int] = {}
        named = ""
        for _ in range(_TRIES):
            way = route(self.view(), flight.chunk)
            node = named or next((ask for ask in way.asks if not tried.get(ask)), ORIGIN)
            insist = node not in way.relays and node != self.crowd.home(flight.chunk)
            insist |= bool(named)
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
            except HurryError:
                flight.urgent, tried[node] = True, tried[node] - 1
            except AbsentError as error:
                log.debug("%s", error)
                self.crowd.note(node, flight.chunk, False)
            except PeerError as error:
                log.info("%s; asking somebody else for chunk %d", error, flight.chunk)
                metrics.PEER_FAILURES.labels("broken").inc()
                if not isinstance(error, SlowError):
                    self._parts.suspect(node, str(error))
            flight.restart()
        return None

    def _ask(self, flight: Flight, member: Member, view: memoryview, insist: bool) -> bytes:
        name = ChunkName(self.blob, self.chunk_size, flight.chunk)
        flight.asking, flight.chain = member.node, (member.node,)
        sink = FlightSink(flight, member.node, self._parts.me, self._parts.neighbours.slow)
        said = self._parts.client.fetch(member, name, view, sink, flight.urgent, insist)
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
        """Let go of what is on disk."""
        self.drop_carried()
        self._here.close()
