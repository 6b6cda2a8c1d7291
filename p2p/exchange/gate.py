"""The home gate: the one place of a node where chunks are read from the origin.

Bulk goes through few streams, one in a crowd: measured with 8 nodes, two streams a node took 1.27
to 1.57 of the bound where one took 1.09, because what arrives on one is passed on sooner. Alone,
nobody is waiting for it, and several streams fill the link. A fault gets a stream of its own at
once: were it to queue behind bulk, bulk that pauses for faults would wait for itself.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from blake3 import blake3

from weightstream import metrics
from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch.job import Attempt
from weightstream.cachefs.fetch.retry import delay_s
from weightstream.cachefs.fetch.source import Source
from weightstream.errors import LoadCancelled, UnavailableError, WeightstreamError
from weightstream.p2p.exchange.flights import Flight, FlightState, Shelf
from weightstream.p2p.exchange.lanes import Lanes
from weightstream.p2p.exchange.paces import Paces
from weightstream.p2p.schedule import ORIGIN, is_slow

log = logging.getLogger(__name__)

_ROOM_S = 30.0
_IDLE_S = 5.0
_STEP_BYTES = 128 << 10
"""How soon what comes is passed on. In steps of 1 MiB a home on a slow link seemed dead: with 8
nodes on 100 Mbit/s a step took 0.7 s, and seconds when the origin's streams were unfair."""
_STARVED_TIMES = 2.0
_MOST_FAULTS = 8
_FAULT_LATE_S, _SPLIT = 0.8, 4
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
        from_holders: Callable[[Flight], bool] = lambda flight: False,
    ) -> None:
        """`from_holders` has peers bring a chunk that the origin did not give; False: none did."""
        self._work = work
        self._shelf = shelf
        self._lanes = lanes
        self._paces = paces
        self._source_of = source_of
        self._deadline_s = deadline_s
        self._streams = streams
        self._from_holders = from_holders
        self._changed = threading.Condition()
        self._queue: deque[Flight] = deque()
        self._threads = 0
        self._events = 0
        self._faults = threading.BoundedSemaphore(_MOST_FAULTS)
        self._resorts = threading.BoundedSemaphore(_MOST_RESORTS)
        self._reading: set[_Reading] = set()
        self._starved: set[_Reading] = set()
        self._closed = False
        self.read_bytes = 0

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
        """Ask anew what comes more slowly from the origin than everything from peers, once a
        chunk: a new connection goes on where the old one is. Streams share a link unfairly: of 8
        homes one got a tenth of what the others got, for as long as its connection lasted."""
        if not is_slow(self._paces.now(), ORIGIN, _STARVED_TIMES):
            return
        with self._changed:
            starved = [attempt for attempt in self._reading if attempt.may_starve]
        for attempt in starved:
            self._starve(attempt)
        self._paces.forget(ORIGIN)

    def close(self) -> None:
        """Break everything off."""
        with self._changed:
            self._closed = True
            reading, queued = list(self._reading), list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        for attempt in reading:
            attempt.cancel()
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
        if source is None:
            flight.fail(UnavailableError(f"{flight.blob.uri}: this agent may not read its origin"))
            return
        try:
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
                return flight
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
            self._fill(flight, source, view)
            landed = flight.land(blake3(view).digest())
        if landed:
            self._shelf.put(flight)

    def _fill(self, flight: Flight, source: Source, view: memoryview) -> None:
        failures, heard_s, may_starve = 0, time.monotonic(), True
        while flight.position < len(flight.extent):
            before = flight.position
            part, start = view[before:], flight.extent.start + before
            try:
                self._attempt(flight, source, start, part, flight.advance, may_starve)
            except _StarvedError:
                may_starve = False
                if flight.urgent:
                    self._fill_split(flight, source, view)
            except WeightstreamError as error:
                now_s = time.monotonic()
                if flight.position > before:
                    failures, heard_s = 0, now_s
                silent_s = now_s - heard_s
                wait_s = delay_s(error, failures, silent_s, self._deadline_s, random.random())
                if wait_s is None or self._closed:
                    raise
                failures += 1
                time.sleep(wait_s)

    def _fill_split(self, flight: Flight, source: Source, view: memoryview) -> None:
        """Read what is missing in several parts at once, as far as they come. Not from the first:
        measured, 8 nodes under bulk, one stream brings a fault of 1 MiB in 0.3 s in the median and
        2.5 s at worst, four in 0.5 and 1.2."""
        parts = Parts(flight, _SPLIT)

        def read(number: int) -> None:
            start, stop = parts.bounds(number)
            try:
                self._attempt(
                    flight, source, flight.extent.start + start, view[start:stop],
                    lambda count: parts.advance(number, count), may_starve=False,
                )  # fmt: skip
            except WeightstreamError as error:
                log.debug("part %d of a fault's chunk: %s; going on without", number, error)

        others = [
            threading.Thread(target=read, args=(i,), daemon=True, name="weightstream-fault-part")
            for i in range(1, _SPLIT)
        ]
        for thread in others:
            thread.start()
        read(0)
        for thread in others:
            thread.join()

    def _attempt(
        self,
        flight: Flight,
        source: Source,
        start: int,
        into: memoryview,
        landed: Callable[[int], None],
        may_starve: bool,
    ) -> None:
        def advance(count: int) -> None:
            landed(count)
            self._paces.got(ORIGIN, count)
            self.read_bytes += count
            metrics.PEER_BYTES.labels("origin").inc(count)
            if not flight.urgent:
                self._lanes.give_way()

        attempt = _Reading(advance, lambda: flight.urgent, _STEP_BYTES)
        attempt.may_starve = may_starve and not flight.urgent
        with self._changed:
            if self._closed:
                raise LoadCancelled("the exchange was closed")
            self._reading.add(attempt)
        late = threading.Timer(_FAULT_LATE_S, self._starve, (attempt,))
        try:
            if may_starve and flight.urgent:
                late.start()
            with self._paces.asked(ORIGIN):
                source.read_into(flight.blob, start, into, attempt)
        except LoadCancelled:
            if attempt in self._starved and not self._closed:
                log.debug("starved of %s chunk %d: asked anew", flight.blob.uri, flight.chunk)
                raise _StarvedError(f"{flight.blob.uri} chunk {flight.chunk}: slow") from None
            raise
        finally:
            late.cancel()
            with self._changed:
                self._reading.discard(attempt)
                self._starved.discard(attempt)

    def _starve(self, attempt: "_Reading") -> None:
        """Break an attempt off whose bytes are to be asked for anew."""
        with self._changed:
            if attempt not in self._reading:
                return
            self._starved.add(attempt)
        attempt.cancel()


class Parts:
    """The rest of a flight, in parts; the flight advances by what has no gap before it."""

    def __init__(self, flight: Flight, count: int) -> None:
        self._flight = flight
        before = flight.position
        left = len(flight.extent) - before
        self._edges = [before + left * i // count for i in range(count + 1)]
        self._done = [0] * count
        self._lock = threading.Lock()

    def bounds(self, number: int) -> tuple[int, int]:
        """Return where a part begins and ends in the flight."""
        return self._edges[number], self._edges[number + 1]

    def advance(self, number: int, count: int) -> None:
        """Say that the next `count` bytes of a part are there."""
        with self._lock:
            self._done[number] += count
            whole = self._edges[0]
            for i, done in enumerate(self._done):
                whole += done
                if whole < self._edges[i + 1]:
                    break
            if whole > self._flight.position:
                self._flight.advance(whole - self._flight.position)


class _Reading(Attempt):
    """An attempt of the gate's."""

    may_starve = False
    """It may be broken off when it is slow."""


class _StarvedError(WeightstreamError):
    """The origin gave far less than peers did: it is asked anew."""
