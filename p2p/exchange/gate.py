"""The home gate: the one place of a node where chunks are read from the origin.

Bulk goes through few streams, one in a crowd: measured with 8 nodes, two streams a node took 1.27
to 1.57 of the bound where one took 1.09, because what arrives on one is passed on sooner. Alone,
nobody is waiting for it, and several streams fill the link. A fault gets a stream of its own at
once: were it to queue behind bulk, bulk that pauses for faults would wait for itself.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from blake3 import blake3

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch.source import Source
from weightstream.errors import LoadCancelled, UnavailableError, WeightstreamError
from weightstream.p2p.exchange.flights import Flight, FlightState, Shelf
from weightstream.p2p.exchange.lanes import Lanes
from weightstream.p2p.exchange.origin_reader import OriginReader
from weightstream.p2p.exchange.paces import Paces

log = logging.getLogger(__name__)

_ROOM_S = 30.0
_IDLE_S = 5.0
_MOST_FAULTS = 8
_MOST_RESORTS = 2


class OwnWork(Protocol):
    """Where the gate finds what to read when nobody waits for anything."""

    def next_own(self) -> Flight | None:
        """Return a new flight for the next chunk that is this node's to read, or None."""
        ...

    def take(self) -> bool:
        """Take a chunk over that another node has not begun; True when `next_own` has it now."""
        ...


class Gate:
    """Threads come with work and go without. Thread-safe."""

    def __init__(
        self,
        work: OwnWork,
        shelf: Shelf,
        lanes: Lanes,
        paces: Paces,
        source_of: Callable[[Blob], Source | None],
        deadline_s: float,
        streams: Callable[[], int],
        link_share: Callable[[Flight], float | None] = lambda flight: None,
        from_holders: Callable[[Flight], bool] = lambda flight: False,
        hold_others: Callable[[Flight], None] = lambda flight: None,
    ) -> None:
        """`streams` says how many may read bulk, `link_share` is that of `Transfer`.
        `from_holders` has peers bring a chunk that the origin did not give; False: none did.
        `hold_others` has them read no bulk for a moment, while this node reads a fault."""
        self._work = work
        self._shelf = shelf
        self._lanes = lanes
        self._source_of = source_of
        self._streams = streams
        self._from_holders = from_holders
        self._hold_others = hold_others
        self._changed = threading.Condition()
        self._queue: deque[Flight] = deque()
        self._threads = 0
        self._events = 0
        self._faults = threading.BoundedSemaphore(_MOST_FAULTS)
        self._resorts = threading.BoundedSemaphore(_MOST_RESORTS)
        self._reader = OriginReader(lanes, paces, deadline_s, link_share)
        self._closed = False
        self.is_idle = True
        """There is nothing to read: what this node is late with is all that is left."""

    def want(self, flight: Flight) -> None:
        """Read a queued flight as soon as its turn comes: before what nobody waits for."""
        flight.is_queued = True
        with self._changed:
            self._queue.append(flight)
        self.poke()

    def hurry(self, flight: Flight) -> None:
        """Read a queued flight now, beside the bulk: a reader waits for it."""
        threading.Thread(
            target=self._read_fault, args=(flight,), daemon=True, name="weightstream-fault"
        ).start()

    def poke(self) -> None:
        """Say that there is work."""
        with self._changed:
            self._events += 1
            while self._threads < self._streams() and not self._closed:
                self._threads += 1
                threading.Thread(target=self._run, daemon=True, name="weightstream-gate").start()
            self._changed.notify_all()

    def look(self) -> None:
        """See `OriginReader.look`."""
        self._reader.look()

    def hold(self) -> None:
        """Read no bulk for a moment: see `Hold`."""
        self._reader.hold.begin()

    @property
    def read_bytes(self) -> int:
        """Return what came from the origin."""
        return self._reader.read_bytes

    def close(self) -> None:
        """Break everything off."""
        with self._changed:
            self._closed = True
            queued = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        self._reader.close()
        for flight in queued:
            flight.fail(LoadCancelled("the exchange was closed"))

    def read(self, flight: Flight) -> None:
        """Bring a chunk from the origin on this thread; it lands, or fails."""
        if flight.claim():
            self._bring(flight)

    def resort(self, flight: Flight) -> None:
        """Bring a chunk that no peer gave: the last resort, a few at a time on every node."""
        with self._resorts:
            flight.restart()
            self._bring(flight)

    def _bring(self, flight: Flight) -> None:
        source = self._source_of(flight.blob)
        try:
            if source is None:
                raise UnavailableError(f"{flight.blob.uri}: this agent may not read its origin")
            self._read(flight, source)
        except WeightstreamError as error:
            if self._closed or isinstance(error, LoadCancelled) or not self._from_holders(flight):
                flight.fail(error)
        except Exception as error:
            log.exception("unexpected, at %s chunk %d", flight.blob.uri, flight.chunk)
            flight.fail(WeightstreamError(f"{flight.blob.uri} chunk {flight.chunk}: {error!r}"))

    # The threads

    def _run(self) -> None:
        while (flight := self._next()) is not None:
            self.read(flight)

    def _next(self) -> Flight | None:
        idle_until_s = time.monotonic() + _IDLE_S
        while True:
            with self._changed:
                seen = self._events
                flight = self._pop()
                surplus = self._threads > max(1, self._streams())
                if self._closed or (surplus and flight is None):
                    self._threads -= 1
                    return None
            flight = flight or self._work.next_own()
            if flight is not None:
                self.is_idle = False
                return flight
            self.is_idle = True
            if self._work.take():
                continue
            with self._changed:
                left_s = idle_until_s - time.monotonic()
                if seen == self._events and (left_s <= 0 or not self._changed.wait(left_s)):
                    self._threads -= 1
                    return None

    def _pop(self) -> Flight | None:
        while self._queue:
            flight = self._queue.popleft()
            if flight.state is FlightState.QUEUED:
                return flight
        return None

    def _read_fault(self, flight: Flight) -> None:
        with self._faults:
            if flight.state is FlightState.QUEUED and not self._closed:
                flight.urgent = True
                self._hold_others(flight)
                with self._lanes.fault():
                    self.read(flight)

    # Reading

    def _read(self, flight: Flight, source: Source) -> None:
        flight.raise_if_over()
        slab = flight.slab or self._shelf.take(flight, _ROOM_S)
        if slab is None:
            raise UnavailableError(f"{flight.blob.uri} chunk {flight.chunk}: no memory for it")
        flight.from_origin = True
        flight.begin(slab)
        with flight.memory() as view:
            self._reader.fill(flight, source, view)
            landed = flight.land(blake3(view).digest())
        if landed:
            self._shelf.put(flight)
