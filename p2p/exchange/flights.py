"""Chunks in memory: on their way, or landed and kept for those who will ask for them next.

A flight is one chunk. It is QUEUED until somebody begins to fetch it, RUNNING while its bytes come,
then LANDED or FAILED. Whoever wants the chunk in between waits on the same flight: single flight
for local readers and peers alike. Bytes of a RUNNING flight may be passed on to peers, who check
them themselves; to local readers only when they come from the origin.

    QUEUED -> RUNNING -> LANDED -> dropped when memory is wanted
                     \\-> FAILED
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Blob, Extent
from weightstream.errors import LoadCancelled, WeightstreamError
from weightstream.p2p.exchange.passing import Passing
from weightstream.p2p.schedule import BLOCK_BYTES

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.slabs import Slab, SlabPool

_ROOM_POLL_S = 0.02
_HURRY_S = 0.05
"""What is on its way of other bulk takes 30 ms of it, on a link of 200 Mbit/s. After that a chunk
of 1 MiB comes in 40 ms; asked for anew it takes 100."""


class FlightState(Enum):
    """See the module."""

    QUEUED = auto()
    RUNNING = auto()
    LANDED = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class Scatter:
    """Who shares the rest of a chunk: each asks `home` for its own blocks and gives them on."""

    home: str
    receivers: tuple[str, ...]


class Flight:
    """One chunk on its way. Thread-safe."""

    def __init__(
        self,
        blob: Blob,
        chunk: int,
        extent: Extent,
        offer: "Callable[[Flight], None]" = lambda flight: None,
    ) -> None:
        """`offer` hears when there is more of it that may be trusted."""
        self.blob = blob
        self.chunk = chunk
        self.extent = extent
        self.state = FlightState.QUEUED
        self.position = 0
        self.from_origin = False
        self.digest = b""
        self.error: WeightstreamError | None = None
        self.generation = 0
        """Counts restarts."""
        self.asking = ""
        """The peer that it is asked of now."""
        self.chain: tuple[str, ...] = ()
        """That peer, and through whom it waits itself."""
        self.urgent = False
        """A fault: it goes before bulk, here and at the sender."""
        self.is_hurried = False
        """A fault came to a flight that runs as bulk: other bulk gives way to it."""
        self.is_sent_ahead = False
        """The gate was told to read it before bulk."""
        self._looked_s, self._looked_at = 0.0, 0
        self.asks_again = False
        """It is to be asked for again, as a fault."""
        self._interrupt: Callable[[], None] | None = None
        self.is_needed = False
        """A reader or a peer waits for it."""
        self.is_queued = False
        self.is_parked = False
        """Nobody brings it yet: the swarm may."""
        self.taker = ""
        """Who has taken it over from this node's gate: peers that wait for it are sent there."""
        self.is_taken = False
        """This node has taken it over while it waited for a peer to give it."""
        self.unread = False
        """A local plan wants it, and nobody has read it yet."""
        self.passing = Passing(len(extent))
        self.scatter: Scatter | None = None
        """Its home has said that the rest is to be shared."""
        self.is_whole = False
        """It is not to come in parts from several peers, or not once more."""
        self._blocks: set[int] = set()
        """Which blocks beyond `position` are there."""
        self.slab: Slab | None = None
        self._offer = offer
        self._claimed = False
        self._passing = 0
        self._changed = threading.Condition()

    @property
    def is_at_gate(self) -> bool:
        """Say that it waits for the origin behind others."""
        return self.is_queued and self.state is FlightState.QUEUED

    @property
    def is_over(self) -> bool:
        """Say that nothing more will come."""
        return self.state in (FlightState.LANDED, FlightState.FAILED)

    def raise_if_over(self) -> None:
        """Raise LoadCancelled for a flight that failed before anybody fetched it, or meanwhile: it
        is nobody's any more, and must not land."""
        if self.is_over:
            raise LoadCancelled(f"{self.blob.uri} {self.extent}: not wanted any more")

    def claim(self) -> bool:
        """Become the one who brings it; False when somebody is already."""
        with self._changed:
            mine = not self._claimed and not self.is_over
            self._claimed = True
            return mine

    def give_away(self, taker: str) -> bool:
        """Have `taker` bring it instead of the gate; False when a reader waits, or it was begun."""
        with self._changed:
            free = self.is_at_gate and not (self._claimed or self.urgent or self.is_hurried)
            if free:
                self._claimed = True
                self.taker = taker
                self._changed.notify_all()
            return free

    def begin(self, slab: "Slab") -> None:
        """Start to fetch into `slab`, which the flight owns from now on."""
        with self._changed:
            self.slab = slab
            self.state = FlightState.RUNNING
            self._changed.notify_all()

    def restart(self) -> None:
        """Begin anew from the first byte: the source that brought some is not trusted any more.

        What peers were passed of it they cannot complete: the digest never follows.
        """
        with self._changed:
            self.position = 0
            self.scatter = None
            self._blocks.clear()
            self.from_origin = False
            self.generation += 1
            self._changed.notify_all()

    def advance(self, count: int) -> None:
        """Say that the next `count` bytes are there; wakes only whom they are for."""
        with self._changed:
            self.position += count
            if self.from_origin or self._passing:
                self._changed.notify_all()
        if self.from_origin:
            self._offer(self)

    def share(self, scatter: Scatter) -> None:
        """Have the rest gathered, if it comes as bulk from the home that says so."""
        with self._changed:
            comes = self.state is FlightState.RUNNING and self.asking == scatter.home
            if comes and not (self.urgent or self.is_hurried or self.is_whole):
                self.scatter = scatter

    def put_block(self, block: int) -> None:
        """Say that a block is there, in whatever order they come."""
        with self._changed:
            self._blocks.add(block)
            while (first := self.position // BLOCK_BYTES) in self._blocks:
                self._blocks.discard(first)
                self.position = min((first + 1) * BLOCK_BYTES, len(self.extent))
            self._changed.notify_all()

    def wait_part(self, start: int, stop: int, timeout_s: float) -> bool:
        """Wait for the bytes from `start` to `stop`; False when time is up, or it failed."""
        with self._changed:
            self._passing += 1
            try:
                self._changed.wait_for(lambda: self._has(start, stop) or self.is_over, timeout_s)
            finally:
                self._passing -= 1
            return self._has(start, stop)

    def _has(self, start: int, stop: int) -> bool:
        if self.state is FlightState.LANDED or self.position >= stop:
            return self.state is not FlightState.FAILED
        blocks = range(max(start, self.position) // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
        return self._blocks.issuperset(blocks)

    def land(self, digest: bytes) -> bool:
        """Say that all bytes are there and are what `digest` says; False when it has failed."""
        with self._changed:
            if self.is_over:
                return False
            self.digest = digest
            self.position = len(self.extent)
            self.state = FlightState.LANDED
            self._changed.notify_all()
        self._offer(self)
        return True

    def fail(self, error: WeightstreamError) -> None:
        """Say that nobody gave it."""
        with self._changed:
            if self.is_over:
                return
            self.error = error
            self.state = FlightState.FAILED
            self._changed.notify_all()
        self.drop()

    def hurry(self) -> None:
        """Have it come before other bulk; called again as long as a reader waits. It is asked for
        again, as a fault, when no byte has come, or when it comes slowly and half is missing."""
        now_s = time.monotonic()
        with self._changed:
            first, self.is_hurried = not self.is_hurried, True
            if not self.position:
                self.asks_again = True
                if self._interrupt is not None:
                    self._interrupt()
            elif first:
                self._looked_s, self._looked_at = now_s, self.position
            elif now_s - self._looked_s >= _HURRY_S:
                moved, size = self.position - self._looked_at, len(self.extent)
                self.asks_again |= moved < size // 16 and self.position < size // 2
                self._looked_s, self._looked_at = now_s, self.position

    def asks(self, interrupt: Callable[[], None] | None) -> None:
        """Hear how to end the wait for the peer that it is asked of; None: that is over."""
        with self._changed:
            self._interrupt = interrupt
            if interrupt is not None and self.is_hurried:
                interrupt()

    def wake(self) -> None:
        """Have whoever waits look again."""
        with self._changed:
            self._changed.notify_all()

    def wait_beyond(self, offset: int, timeout_s: float, local: bool) -> int:
        """Return how many bytes may be read, more than `offset` unless time is up or it failed."""
        with self._changed:
            self._passing += not local
            try:
                self._changed.wait_for(
                    lambda: self._visible(local) > offset or self.is_over, timeout_s
                )
            finally:
                self._passing -= not local
            return self._visible(local)

    def wait_first(self, timeout_s: float, insists: bool) -> int:
        """Return how many bytes may be passed on; 0 when time is up, it failed, or a taker has it
        now and the asker does not insist."""
        with self._changed:
            self._passing += 1
            try:
                self._changed.wait_for(
                    lambda: (
                        self._visible(False) > 0
                        or self.is_over
                        or (bool(self.taker) and not insists)
                    ),
                    timeout_s,
                )
            finally:
                self._passing -= 1
            return self._visible(False)

    def wait_over(self, timeout_s: float) -> bool:
        """Wait for the end; False when time is up."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_over, timeout_s)

    def _visible(self, local: bool) -> int:
        if self.state is FlightState.LANDED:
            return len(self.extent)
        if self.state is FlightState.RUNNING and (self.from_origin or not local):
            return self.position
        return 0

    def hold(self) -> "Slab | None":
        """Keep the memory for one more user, who releases the slab; None when it was dropped."""
        with self._changed:
            if self.slab is not None:
                self.slab.hold()
            return self.slab

    @contextmanager
    def memory(self) -> Iterator[memoryview]:
        """Keep the memory of a flight that has begun while the block fills it: it may fail
        meanwhile, when everything is closed."""
        slab = self.hold()
        if slab is None:
            raise LoadCancelled(f"{self.blob.uri} {self.extent}: not wanted any more")
        try:
            yield slab.view
        finally:
            slab.release()

    def drop(self) -> None:
        """Let the memory go as soon as its users are done."""
        with self._changed:
            slab, self.slab = self.slab, None
        if slab is not None:
            slab.release()


class Shelf:
    """The memory of all flights: landed ones stay until it is wanted, the oldest go first."""

    def __init__(
        self, slabs: "SlabPool", limit_bytes: int, is_stored: Callable[[Flight], bool]
    ) -> None:
        self._slabs = slabs
        self._limit_bytes = limit_bytes
        self._is_stored = is_stored
        self._lock = threading.Lock()
        self._landed: OrderedDict[tuple[str, int], Flight] = OrderedDict()
        self._landed_bytes = 0
        self.on_drop: Callable[[Flight], None] = lambda flight: None

    @property
    def landed_bytes(self) -> int:
        """Return what landed flights take."""
        return self._landed_bytes

    def take(self, flight: Flight, patience_s: float) -> "Slab | None":
        """Return memory for a flight, for which landed ones may have to go; None: time is up.

        What a local plan wants and nobody read yet goes only for a flight that a reader waits for,
        and the last to be read goes first.
        """
        until_s, count = time.monotonic() + patience_s, len(flight.extent)
        while True:
            if self._landed_bytes + count <= self._limit_bytes or flight.is_needed:
                slab = self._slabs.try_take(count)
                if slab is not None:
                    return slab
            if self._drop_one(flight.is_needed):
                continue
            if time.monotonic() >= until_s or flight.is_over:
                return None
            time.sleep(_ROOM_POLL_S)

    def put(self, flight: Flight) -> None:
        """Keep a landed flight."""
        with self._lock:
            self._landed[flight.blob.id, flight.chunk] = flight
            self._landed_bytes += len(flight.extent)

    def discard(self, flight: Flight) -> None:
        """Let one go, if it is kept."""
        self._let_go(flight)

    def touch(self, flight: Flight) -> None:
        """Make it the last to go."""
        with self._lock:
            if (key := (flight.blob.id, flight.chunk)) in self._landed:
                self._landed.move_to_end(key)

    def drop_idle(self) -> None:
        """Let everything go that is in the store: it is served from there."""
        with self._lock:
            gone = [flight for flight in self._landed.values() if not flight.unread]
        for flight in gone:
            if self._is_stored(flight):
                self._let_go(flight)

    def drop_all(self) -> None:
        """Let everything go."""
        for flight in tuple(self._landed.values()):
            self._let_go(flight)

    def _drop_one(self, needed: bool) -> bool:
        with self._lock:
            flight = self._choose(needed)
        if flight is not None:
            self._let_go(flight)
        return flight is not None

    def _choose(self, needed: bool) -> Flight | None:
        """Return the oldest that is in the store, else the oldest that no plan waits for."""
        idle = [flight for flight in self._landed.values() if not flight.unread]
        for flight in idle:
            if self._is_stored(flight):
                return flight
        if idle:
            return idle[0]
        for flight in self._landed.values():
            if self._is_stored(flight):  # its reader finds it there
                return flight
        return next(reversed(self._landed.values()), None) if needed else None

    def _let_go(self, flight: Flight) -> None:
        with self._lock:
            if self._landed.pop((flight.blob.id, flight.chunk), None) is None:
                return
            self._landed_bytes -= len(flight.extent)
        self.on_drop(flight)
        flight.drop()
