"""Reading one chunk from the origin: again where it broke off, anew where it is starved."""

import functools
import logging
import random
import threading
import time
from collections.abc import Callable

from weightstream import metrics
from weightstream.cachefs.fetch.job import Attempt
from weightstream.cachefs.fetch.retry import delay_s
from weightstream.cachefs.fetch.source import Source
from weightstream.errors import LoadCancelled, WeightstreamError
from weightstream.p2p.exchange.flights import Flight
from weightstream.p2p.exchange.lanes import Hold, Lanes
from weightstream.p2p.exchange.paces import Paces
from weightstream.p2p.schedule import ORIGIN, is_slow

log = logging.getLogger(__name__)

_STEP_BYTES = 128 << 10
"""How soon what comes is passed on. In steps of 1 MiB a home on a slow link seemed dead: with 8
nodes on 100 Mbit/s a step took 0.7 s, and seconds when the origin's streams were unfair."""
_STARVED_TIMES = 2.0
_FAULT_LATE_S, _FAULT_S_PER_MIB, _SPLIT = 0.35, 0.05, 4
"""With other homes on hold 1 MiB takes 0.1 to 0.2 s at 200 Mbit/s: after 0.4 it is late."""


class OriginReader:
    """Fills flights. Thread-safe."""

    def __init__(
        self,
        lanes: Lanes,
        paces: Paces,
        deadline_s: float,
        link_share: Callable[[Flight], float | None] = lambda flight: None,
    ) -> None:
        """`link_share` says how much of the origin's link a stream should have: see `Transfer`."""
        self._lanes = lanes
        self._paces = paces
        self._deadline_s = deadline_s
        self._link_share = link_share
        self._lock = threading.Lock()
        self._reading: set[_Reading] = set()
        self._starved: set[_Reading] = set()
        self._closed = False
        self.hold = Hold()
        """Bulk waits for it."""
        self.read_bytes = 0

    def look(self) -> None:
        """Ask anew what comes more slowly from the origin than everything from peers, once a
        chunk: a new connection goes on where the old one is. Streams share a link unfairly: of 8
        homes one got a tenth of what the others got, for as long as its connection lasted."""
        if not is_slow(self._paces.now(), ORIGIN, _STARVED_TIMES):
            return
        with self._lock:
            starved = [attempt for attempt in self._reading if attempt.may_starve]
        for attempt in starved:
            self._starve(attempt)
        self._paces.forget(ORIGIN)

    def close(self) -> None:
        """Break everything off."""
        with self._lock:
            self._closed = True
            reading = list(self._reading)
        for attempt in reading:
            attempt.cancel()

    def fill(self, flight: Flight, source: Source, view: memoryview) -> None:
        """Read the rest of a flight into its memory; raises `WeightstreamError`."""
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
        """Read what is missing in several parts at once, as far as they come; what is late of a
        part is asked for once more. Not from the first: measured, 8 nodes under bulk, one stream
        brings a fault of 1 MiB in 0.3 s in the median and 2.5 s at worst, four in 0.5 and 1.2."""
        parts = Split(flight, _SPLIT)

        def read_part(number: int, may_starve: bool) -> None:
            start, stop = parts.left(number)
            if start < stop:
                self._attempt(
                    flight, source, flight.extent.start + start, view[start:stop],
                    lambda count: parts.advance(number, count), may_starve,
                )  # fmt: skip

        def read(number: int) -> None:
            try:
                try:
                    read_part(number, may_starve=True)
                except _StarvedError:
                    read_part(number, may_starve=False)
            except WeightstreamError as error:
                log.debug("part %d of a fault's chunk: %s; going on without", number, error)

        others = [
            threading.Thread(target=read, args=(i,), daemon=True, name="weightstream-fault-part")
            for i in range(1, _SPLIT)
        ]
        begun: list[threading.Thread] = []
        try:
            for thread in others:
                thread.start()
                begun.append(thread)
            read(0)
        finally:
            for thread in begun:  # the memory is another's when this returns
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
            if flight.urgent:
                self._lanes.moves()
                return
            if flight.position == len(flight.extent):
                return  # nothing more to wait with: others wait to hear what it is
            self._lanes.give_way()
            if not flight.is_hurried:  # a reader waits for this one as well
                self.hold.wait()

        share = functools.partial(self._link_share, flight)
        attempt = _Reading(advance, lambda: flight.urgent, share)
        attempt.may_starve = may_starve and not flight.urgent
        with self._lock:
            if self._closed:
                raise LoadCancelled("the exchange was closed")
            self._reading.add(attempt)
        late = threading.Timer(_late_s(into), self._starve, (attempt,))
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
            with self._lock:
                self._reading.discard(attempt)
                self._starved.discard(attempt)

    def _starve(self, attempt: "_Reading") -> None:
        """Break an attempt off whose bytes are to be asked for anew."""
        with self._lock:
            if attempt not in self._reading:
                return
            self._starved.add(attempt)
        attempt.cancel()


def _late_s(into: memoryview) -> float:
    """Return after how many seconds a fault is late: of 1 MiB 0.4, of 8 MiB 0.75."""
    return _FAULT_LATE_S + _FAULT_S_PER_MIB * len(into) / (1 << 20)


class Split:
    """The rest of a flight, in parts; the flight advances by what has no gap before it."""

    def __init__(self, flight: Flight, count: int) -> None:
        self._flight = flight
        before = flight.position
        left = len(flight.extent) - before
        self._edges = [before + left * i // count for i in range(count + 1)]
        self._done = [0] * count
        self._lock = threading.Lock()

    def left(self, number: int) -> tuple[int, int]:
        """Return where in the flight what is missing of a part begins and ends."""
        with self._lock:
            return self._edges[number] + self._done[number], self._edges[number + 1]

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

    def __init__(
        self,
        sink: Callable[[int], None],
        is_urgent: Callable[[], bool],
        share: Callable[[], float | None],
    ) -> None:
        super().__init__(sink, is_urgent, _STEP_BYTES)
        self._share = share

    def link_share(self) -> float | None:
        """See `Transfer.link_share`."""
        return self._share()


class _StarvedError(WeightstreamError):
    """The origin gave far less than peers did: it is asked anew."""
