"""One range in flight: attempts, resumption from the byte reached, and the hedge beside it."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from weightstream import metrics
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.claims import Run
from weightstream.cachefs.fetch.landing import Lease, Priority
from weightstream.cachefs.fetch.retry import delay_s
from weightstream.cachefs.fetch.slabs import Slab, SlabPool
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.store.write_back import copy
from weightstream.errors import (
    LoadCancelled,
    ProtocolError,
    UnavailableError,
    WeightstreamError,
)

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.flow import Flow

log = logging.getLogger(__name__)


class Attempt:
    """The `Transfer` of one attempt: counts bytes into a sink, can be cancelled from outside."""

    def __init__(
        self,
        sink: Callable[[int], None],
        is_urgent: Callable[[], bool] = lambda: False,
        step_bytes: int = 1 << 20,
    ) -> None:
        self._is_urgent = is_urgent
        self.step_bytes = step_bytes
        self.is_fresh = False
        self._sink = sink
        self._lock = threading.Lock()
        self._callback: Callable[[], None] | None = None
        self._cancelled = False

    @property
    def urgent(self) -> bool:
        """Say whether a reader waits for it by now."""
        return self._is_urgent()

    def link_share(self) -> float | None:
        """See `Transfer.link_share`: a reader that is alone shares none."""
        return None

    def advance(self, count: int) -> None:
        """See `Transfer.advance`."""
        if self._cancelled:
            raise LoadCancelled("the range is not wanted any more")
        self._sink(count)

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


class Job:
    """Pieces that adjoin, fetched by one request from one source into one lease."""

    def __init__(self, flow: "Flow", run: Run, lease: Lease, for_reader: bool) -> None:
        self.flow = flow
        self.for_reader = for_reader
        """It runs beside as many as are found to do, because a reader waits."""
        self.part = run.part
        self.pieces = run.pieces
        self.extent = run.extent
        self.lease = lease
        self.from_store = run.from_store
        self.is_fresh = run.part.landing.exposes_memory
        """Its memory has no pages yet. Slabs have: they are used again and again."""
        self.position = 0
        self.begun_s = self.heard_s = self.asked_s = time.monotonic()
        self.hedged = False
        self._expired = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._attempt: Attempt | None = None
        self._rescue: tuple[int, Slab] | None = None
        self._hedge_attempt: Attempt | None = None
        self._ended = False

    @property
    def blob(self) -> Blob:
        """Return the blob that is read."""
        return self.part.blob

    def _has_reader(self) -> bool:
        return any(piece.priority is Priority.DEMAND for piece in self.pieces)

    # The reading thread

    def fetch(self, source: Source, deadline_s: float) -> None:
        """Fill the lease from `source`, retrying and resuming; raises the final error."""
        failures, last_position = 0, 0
        try:
            while self.position < len(self.extent):
                try:
                    self._attempt_once(source)
                except WeightstreamError as error:
                    if self._take_rescue():
                        break
                    failures = failures + 1 if self.position == last_position else 0
                    last_position = self.position
                    self._pause_or_raise(self._meant(error), failures, deadline_s)
        finally:
            self._end()

    def _attempt_once(self, source: Source) -> None:
        attempt = Attempt(self._advance, self._has_reader)
        attempt.is_fresh, self.is_fresh = self.is_fresh, False
        with self._lock:
            self._attempt = attempt
        if self.flow.ended or self._rescue is not None:
            raise LoadCancelled(f"{self.blob.uri}: the load was closed")
        self.asked_s = time.monotonic()
        start = self.extent.start + self.position
        source.read_into(self.blob, start, self.lease.view[self.position :], attempt)
        if self.position < len(self.extent):
            raise ProtocolError(
                f"{self.blob.uri}: {source.name} ended {self.extent} after {self.position} bytes"
            )

    def _advance(self, count: int) -> None:
        begin = self.extent.start + self.position
        self.position += count
        self.heard_s = time.monotonic()
        # pyright sees this file twice, here and behind src/'s link, when imports form a ring.
        self.flow.arrived(self, Extent(begin, begin + count))  # pyright: ignore[reportArgumentType]

    def _meant(self, error: WeightstreamError) -> WeightstreamError:
        """Tell the end of an attempt that we broke off for its slowness from a real cancel."""
        if not (self._expired and isinstance(error, LoadCancelled)) or self.flow.ended:
            return error
        slow = UnavailableError(str(error))
        slow.__cause__ = error
        return slow

    def _pause_or_raise(self, error: WeightstreamError, failures: int, deadline_s: float) -> None:
        if self.flow.ended:
            raise error
        silent_s = time.monotonic() - self.heard_s
        wait_s = delay_s(error, failures, silent_s, deadline_s, random.random())
        if wait_s is None:
            if error.transient:
                error.args = (
                    f"{error}; gave up {self.extent} after {silent_s:.0f} s without a byte "
                    f"(deadline {deadline_s:g} s)",
                    *error.args[1:],
                )
            raise error
        metrics.RETRIES.labels(type(error).__name__).inc()
        self.flow.retried(error, wait_s)
        self.asked_s = time.monotonic() + wait_s  # until then nobody lags: we do not ask
        log.debug("again in %.2f s: %s", wait_s, error)
        self._wake.wait(wait_s)

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            hedge, rescue, self._rescue = self._hedge_attempt, self._rescue, None
        if hedge is not None:
            hedge.cancel()
        if rescue is not None:
            rescue[1].release()

    # Other threads

    def cancel(self) -> None:
        """Unblock the reading thread; it finds the flow ended, or a rescue."""
        with self._lock:
            attempt, hedge = self._attempt, self._hedge_attempt
        self._wake.set()
        for one in (attempt, hedge):
            if one is not None:
                one.cancel()

    def expire(self) -> None:
        """Break off an attempt that is not silent but brings nothing: a head sent byte by byte."""
        with self._lock:
            self._expired, attempt = True, self._attempt
        if attempt is not None:
            attempt.cancel()

    def hedge(self, source: Source, slabs: SlabPool) -> None:
        """Read the rest of the range a second time, into memory of its own; the first one wins.

        Runs on a thread of its own. Only the job's own thread ever writes to the lease, so that
        nothing can arrive in it after it was handed on.
        """
        start = self.position
        slab = slabs.try_take(len(self.extent) - start)
        if slab is None:
            return
        won = False
        try:
            won = self._race(source, start, slab)
        except WeightstreamError as error:
            log.debug("hedge of %s %s failed: %s", self.blob.uri, self.extent, error)
        finally:
            if not won:
                slab.release()
        if won:
            self.cancel()

    def _race(self, source: Source, start: int, slab: Slab) -> bool:
        """Read into `slab`; True when it is the reading thread's now, to copy from."""
        attempt = Attempt(lambda _: None, self._has_reader)
        with self._lock:
            if self._ended:
                return False  # the source may be closed by now
            self._hedge_attempt = attempt
        source.read_into(self.blob, self.extent.start + start, slab.view, attempt)
        with self._lock:
            if self._ended:
                return False
            self._rescue = start, slab
            return True

    def _take_rescue(self) -> bool:
        """Copy what the hedge brought beyond our own position; False when there is no hedge."""
        with self._lock:
            rescue, self._rescue = self._rescue, None
        if rescue is None:
            return False
        start, slab = rescue
        done = self.position
        if done < len(self.extent):  # or it had the last byte, and failed after it
            copy(slab.view[done - start :], self.lease.view[done:])
            metrics.HEDGES_WON.inc()
        slab.release()
        self._advance(len(self.extent) - done)
        return True
