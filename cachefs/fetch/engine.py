"""The engine of a process: a few threads that take jobs from flows, as many as the link rewards.

A thread, not an event loop, per range in flight: the work is the kernel's copy into the
destination, done in one system call per MiB with the interpreter lock released.

Scheduling is a scan over the flows, the most urgent first, then the oldest; a flow hands out its
own most urgent piece. The engine's lock is held only to count; claims run outside it, and `_events`
tells a thread that something happened between its look and its sleep.
"""

import atexit
import os
import statistics
import threading
import time
from collections.abc import Sequence

from weightstream import metrics
from weightstream.cachefs.fetch.budget import MemoryBudget, budget_bytes
from weightstream.cachefs.fetch.claims import POLL_S, Claims
from weightstream.cachefs.fetch.concurrency import Concurrency, Window
from weightstream.cachefs.fetch.flow import Flow
from weightstream.cachefs.fetch.hedge import lags, most
from weightstream.cachefs.fetch.job import Job
from weightstream.cachefs.fetch.landing import Priority, Wanted
from weightstream.cachefs.fetch.piece import Part
from weightstream.cachefs.fetch.plans import tell
from weightstream.cachefs.fetch.slabs import SlabPool
from weightstream.cachefs.fetch.source import Plans, Source
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.cachefs.store.write_back import WriteBack
from weightstream.errors import StoreError
from weightstream.settings import Settings

_IDLE_S = 5.0
_WATCH_S = 0.1
_WINDOW_S = 0.25
_FOR_READERS = 2


class Engine:
    """Fetches for every flow of a process. Thread-safe; use `process_engine`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.budget = MemoryBudget(budget_bytes(settings.memory_budget))
        self.slabs = SlabPool(self.budget)
        self.slabs.on_release = self._slab_is_back
        self.write_back = WriteBack(self.slabs)
        limit = settings.concurrency or settings.max_concurrency
        start = settings.concurrency or min(Concurrency().target, limit)
        self._concurrency = Concurrency(target=start, limit=limit)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._flows: list[Flow] = []
        self._events = 0
        self._threads = 0
        self._busy = self._for_readers = 0
        """Threads with a job, and those of them that run one because a reader waits."""
        self._polling = False
        self._watching = False
        self._ended_bytes = 0
        self._open_window()

    def start(self, wanted: Sequence[Wanted], source: Source, store: Store | None) -> Flow:
        """Begin to fetch; returns at once. Close the flow when done."""
        parts = [self._part(one, store) for one in wanted]
        brings, settings = isinstance(source, Plans) and source.brings, self.settings
        claims = Claims(parts, settings.range_size, settings.share_wait_s, brings)
        flow = Flow(parts, source, store, self.write_back, self._kick, claims)
        with self._changed:
            if not self._flows:
                self._open_window()
            self._flows.append(flow)
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, daemon=True, name="weightstream-watch").start()
        self._kick()
        if isinstance(source, Plans):
            tell(source, parts, flow)
        return flow

    def close(self) -> None:
        """End what runs, finish write-back within `exit_flush_s`; for the end of the process.

        The flows first, while their threads still run: the interpreter stops daemon threads when it
        ends, and a stream that is collected after that would wait for its jobs for ever.
        """
        with self._changed:
            flows = tuple(self._flows)
        for flow in flows:
            flow.close()
        self.write_back.drain(self.settings.exit_flush_s)

    def _part(self, wanted: Wanted, store: Store | None) -> Part:
        stored, keep = self._place(wanted, store)
        chunk_bytes = stored.chunk_size if stored else self.settings.chunk_size
        return Part(wanted, stored, keep, chunk_bytes)

    def _place(self, wanted: Wanted, store: Store | None) -> tuple[StoredBlob | None, bool]:
        """Return the blob's place in the store, and whether to keep what is fetched there."""
        if store is None or not wanted.blob.version or not wanted.blob.size:
            return None, False
        try:
            if self.settings.write_back == "off" or not store.writable:
                return store.find_blob(wanted.blob), False
            return store.open_blob(wanted.blob), True
        except StoreError as error:
            self.write_back.pause(str(error))
            return None, False

    # Threads

    def _kick(self) -> None:
        with self._changed:
            self._events += 1
            self._hire()
            self._changed.notify_all()

    def _slab_is_back(self) -> None:
        """Let whoever has no memory ask again; nobody here: an idle engine keeps none."""
        self._kick()
        if not self._flows:
            self.slabs.trim()

    def _hire(self) -> None:
        """Start threads up to the target, or to what is left to do; the lock is held."""
        left = sum(flow.left for flow in self._flows if not flow.ended)
        while self._threads < min(self._target(), left):
            try:
                threading.Thread(target=self._work, daemon=True, name="weightstream-fetch").start()
            except RuntimeError:  # a limit on threads: those there are have to do
                if not self._threads:
                    raise
                return
            self._threads += 1

    def _target(self) -> int:
        """Return how many ranges may run: a few more while a reader waits, who must not queue
        behind ranges of 8 MiB on a slow link, nor behind those that run from before fewer were
        found to do; never more than the settings allow."""
        wanted = self._concurrency.target
        if any(f.urgency is Priority.DEMAND for f in tuple(self._flows) if not f.ended):
            wanted = max(wanted, self._busy - self._for_readers) + _FOR_READERS
        return min(wanted, self._concurrency.limit)

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            metrics.IN_FLIGHT.inc()
            try:
                job.flow.run(job, self.settings.deadline_s)
            finally:
                metrics.IN_FLIGHT.dec()
                self._end(job)

    def _next_job(self) -> Job | None:
        """Return a job, or None when this thread has been idle long enough to end."""
        idle_until = time.monotonic() + _IDLE_S
        while True:
            with self._changed:
                seen = self._events
                free = self._busy < self._target()
                is_extra = self._busy >= self._concurrency.target
                if free:
                    self._busy += 1
                    self._for_readers += is_extra
            if free:
                job = self._claim(is_extra)
                if job is not None:
                    self._pass_polling_on()
                    return job
                with self._changed:
                    self._busy -= 1
                    self._for_readers -= is_extra
                    self._window_saturated &= is_extra  # there may be bulk for others
            with self._changed:
                if seen == self._events and not self._sleep(idle_until):
                    self._threads -= 1
                    return None

    def _pass_polling_on(self) -> None:
        """Wake one to poll where needed: this thread may have done it, and gets busy."""
        if self._needs_polling():
            with self._changed:
                self._changed.notify()

    def _needs_polling(self) -> bool:
        return any(flow.polls for flow in self._flows if not flow.ended)

    def _sleep(self, idle_until: float) -> bool:
        """Wait for an event; one thread polls where a flow needs it. False: idle long enough."""
        now = time.monotonic()
        if not self._polling and self._needs_polling():
            self._polling = True
            try:
                self._changed.wait(POLL_S)
            finally:
                self._polling = False
            return True
        patience_s = _IDLE_S if self._flows else max(0.0, idle_until - now)
        return self._changed.wait(patience_s) or bool(self._flows)

    def _claim(self, for_reader: bool) -> Job | None:
        now = time.monotonic()
        for flow in sorted(self._flows, key=lambda flow: flow.urgency):
            if not flow.ended and now >= flow.quiet_until_s:
                job = flow.claim(for_reader)
                if job is not None:
                    return job
        return None

    def _end(self, job: Job) -> None:
        with self._changed:
            self._busy -= 1
            self._for_readers -= job.for_reader
            self._events += 1
            self._ended_bytes += job.position
            self._flows = [flow for flow in self._flows if not flow.ended or flow.jobs]
            idle = not self._flows and not self._busy
            self._adapt(job)
            self._changed.notify_all()
        if idle:
            self.slabs.trim()

    # Adapting and watching

    def _adapt(self, job: Job) -> None:
        """Judge the window that ends now; the lock is held."""
        throttled, job.flow.throttled = job.flow.throttled, False
        elapsed_s = time.monotonic() - self._window_begun_s
        if self.settings.concurrency or (elapsed_s < _WINDOW_S and not throttled):
            return
        arrived_bytes = self._arrived_bytes() - self._window_begun_bytes
        window = Window(arrived_bytes / elapsed_s, self._window_saturated, throttled)
        self._concurrency = self._concurrency.after(window)
        self._open_window()
        metrics.CONCURRENCY.set(self._concurrency.target)
        self._hire()

    def _open_window(self) -> None:
        self._window_begun_s = time.monotonic()
        self._window_begun_bytes = self._arrived_bytes()
        self._window_saturated = True

    def _arrived_bytes(self) -> int:
        """Count every byte so far, those of ranges in flight too: a range of 8 MiB over a slow
        connection takes longer than a window."""
        running = (job.position for flow in self._flows for job in tuple(flow.jobs))
        return self._ended_bytes + sum(running)

    def _watch(self) -> None:
        """Hedge stragglers, hold deadlines, wake throttled flows; ends with the last flow."""
        while True:
            time.sleep(_WATCH_S)
            with self._changed:
                self._flows = [flow for flow in self._flows if not flow.ended or flow.jobs]
                flows = tuple(self._flows)
                if not flows:
                    self._watching = False
                    break
            metrics.BUDGET_USED_BYTES.set(self.budget.used_bytes)
            for flow in flows:
                self._expire_overdue(flow)
                if self.settings.hedge == "on":
                    self._hedge_stragglers(flow)
            if any(flow.quiet_until_s for flow in flows):
                self._kick()
        self.slabs.trim()
        metrics.BUDGET_USED_BYTES.set(self.budget.used_bytes)

    def _expire_overdue(self, flow: Flow) -> None:
        """Hold ranges to their deadline where the source's own time limits do not end them."""
        limit_s = self.settings.deadline_s + self.settings.stall_timeout_s
        for job in tuple(flow.jobs):
            if not job.from_store and time.monotonic() - job.heard_s > limit_s:
                job.expire()

    def _hedge_stragglers(self, flow: Flow) -> None:
        now = time.monotonic()
        typical_s = statistics.median(flow.job_seconds[-32:]) if flow.job_seconds else None
        jobs = tuple(flow.jobs)
        room = most(len(jobs)) - sum(job.hedged for job in jobs)
        for job in sorted(jobs, key=lambda job: job.begun_s):
            silent_s = now - max(job.heard_s, job.asked_s)
            if job.from_store or job.hedged:
                continue
            if room > 0 and lags(now - job.asked_s, silent_s, typical_s):
                room -= 1
                job.hedged = True
                flow.hedged()
                threading.Thread(
                    target=job.hedge,
                    args=(flow.source, self.slabs),
                    daemon=True,
                    name="weightstream-hedge",
                ).start()


_engines: dict[Settings, Engine] = {}
_engines_lock = threading.Lock()


def process_engine(settings: Settings) -> Engine:
    """Return this process's engine for these settings."""
    with _engines_lock:
        engine = _engines.get(settings)
        if engine is None:
            engine = _engines[settings] = Engine(settings)
        return engine


def _forget_engines() -> None:
    """In a forked child: the parent's threads do not exist here, and its locks may be held."""
    global _engines_lock
    _engines_lock = threading.Lock()
    _engines.clear()


def _close_engines() -> None:
    for engine in tuple(_engines.values()):
        engine.close()


os.register_at_fork(after_in_child=_forget_engines)
atexit.register(_close_engines)
