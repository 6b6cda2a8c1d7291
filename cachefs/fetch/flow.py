"""One request of a reader: what it waits for, what has landed, and whether it was right.

Locks: `_lock` guards the stages of pieces and the set of jobs, and is never held across I/O or a
landing's method; `_claiming` serialises claims, which touch the store's locks and ask the landing
for memory.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from weightstream import metrics
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.checks import ANSWER_WAIT_S, BlobCheck, refute
from weightstream.cachefs.fetch.claims import Claims, Run, unlock
from weightstream.cachefs.fetch.job import Job
from weightstream.cachefs.fetch.landing import HoldsBack, Lease, Priority
from weightstream.cachefs.fetch.memory import populate
from weightstream.cachefs.fetch.piece import Part, Stage
from weightstream.cachefs.fetch.progress import Meter, Progress
from weightstream.cachefs.fetch.source import Plan, Plans, Source
from weightstream.cachefs.store import Store
from weightstream.cachefs.store.write_back import WriteBack
from weightstream.errors import (
    LoadCancelled,
    StoreError,
    ThrottledError,
    UsageError,
    WeightstreamError,
)

log = logging.getLogger(__name__)

_REFUSED_S = 0.02
_SETTLE_S = 10.0
_PATIENCE = 0.5
"""What a load may wait for the disk at its end, as a part of its time. On links that a disk can
follow there is nothing to wait for; on an unshaped loopback, where it cannot, writing the backlog
from where it lies took no longer than copying it away. At 0.05 a twentieth of it was lost; at 0.3
one load in four left chunks out, and the next process fetched those again: 0.7 s, not 5 ms."""


class Flow:
    """Made by `Engine.start`. Thread-safe."""

    def __init__(
        self,
        parts: Sequence[Part],
        source: Source,
        store: Store | None,
        write_back: WriteBack,
        kick: Callable[[], None],
        claims: Claims,
    ) -> None:
        self.source = source
        self._store = store
        self._write_back = write_back
        self._kick = kick
        self._claims = claims
        self._parts = list(parts)
        self._by_blob: dict[Blob, list[Part]] = {}
        for part in parts:
            self._by_blob.setdefault(part.blob, []).append(part)
        self._checks = {part: BlobCheck(part.blob, source) for part in parts if part.covers_blob()}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._claiming = threading.Lock()
        self._refused_until_s = 0.0
        self._left = sum(len(part.planned) for part in parts)
        self._waiters = 0
        self._meter = Meter(sum(len(p.extent) for part in parts for p in part.planned))
        self._error: WeightstreamError | None = None
        self._judging = threading.Lock()
        self._wrong: dict[Part, WeightstreamError] | None = None
        self.jobs: set[Job] = set()
        self.job_seconds: list[float] = []
        self.stopping = False
        self._parted = False
        self._plan: Plan | None = None
        self._source_brings = isinstance(source, Plans) and source.brings
        self._process = os.getpid()
        self.throttled = False
        self.quiet_until_s = 0.0
        if any(not check.answered for check in self._checks.values()):
            threading.Thread(target=self._ask, daemon=True, name="weightstream-sums").start()

    # What readers call

    def wait(self, blob: Blob, extent: Extent, timeout_s: float | None = None) -> None:
        """Return when the wanted bytes of `extent` have landed; raise what went wrong.

        Without a time-out the wait is bounded by the deadlines of the ranges. TimeoutError.
        """
        parts = self._by_blob.get(blob)
        if parts is None:
            raise UsageError(f"{blob.uri} is not part of this flow")
        self._wait_until(lambda: all(p.has_landed(extent) for p in parts), timeout_s)

    def join(self) -> None:
        """Return when everything has landed and passed its checks; raise what went wrong."""
        self._wait_until(lambda: self._left == 0, None)
        for error in self._judge().values():
            raise error

    def boost(self, blob: Blob, extent: Extent) -> None:
        """Fetch the pieces of `extent` before everything else: a reader waits for them."""
        for part in self._by_blob.get(blob, []):
            self._claims.boost(part.overlapping(extent))
        self.poke()
        with self._lock:
            plan = self._plan
        if plan is not None:  # what comes as bulk goes first from now on
            plan.hurry(blob, extent)

    def brings(self, blob: Blob, extent: Extent) -> bool:
        """Say whether some of `extent` is still to land."""
        if self.ended:
            return False
        pieces = (p for part in self._by_blob.get(blob, []) for p in part.overlapping(extent))
        return any(piece.stage is not Stage.LANDED for piece in pieces)

    def poke(self) -> None:
        """Say that a landing may have memory again."""
        self._refused_until_s = 0.0
        self._kick()

    def settle(self) -> None:
        """End every dependence on the landings' memory, so that the caller may write to it."""
        patience_s = _PATIENCE * self._meter.snapshot().elapsed_s
        self._write_back.settle(self, patience_s, _SETTLE_S)

    def progress(self) -> Progress:
        """Return how far the flow is."""
        return self._meter.snapshot()

    def close(self) -> None:
        """Cancel what is left. When it returns, no thread touches the landings. Idempotent.

        In a forked child there is nothing to end: the threads are the parent's.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            self.stopping = True
            jobs = list(self.jobs)
            plan, self._plan = self._plan, None
        for job in jobs:
            job.cancel()
        self._kick()
        if plan is not None:
            plan.close()
        with self._changed:
            while self.jobs:
                self._changed.wait()
            first, self._parted = not self._parted, True
            self._changed.notify_all()
        if first:
            try:
                self.settle()
            finally:
                self._part_with_store()

    def __enter__(self) -> "Flow":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What the engine calls

    @property
    def ended(self) -> bool:
        """Say that the engine need not look here any more."""
        return self.stopping or self._left == 0 or self._error is not None

    @property
    def polls(self) -> bool:
        """Say that a claim may succeed later without anybody's kick."""
        return self._refused_until_s > 0 or self._claims.waits_for_others

    @property
    def urgency(self) -> Priority:
        """Return the priority of what would be claimed next."""
        return self._claims.urgency

    @property
    def left(self) -> int:
        """Return the number of pieces that have not landed."""
        return self._left

    def claim(self, for_reader: bool) -> Job | None:
        """Return the next job, or None when there is nothing to do right now: `for_reader` says
        that only what a reader waits for counts."""
        with self._claiming:
            if self.ended or time.monotonic() < self._refused_until_s:
                return None
            self._refused_until_s = 0.0
            run = self._claims.next_run(for_reader)
            if run is None:
                return None
            try:
                lease = self._reserve(run)
            except Exception as error:  # the landing's: an engine's thread must outlive it
                self._claims.put_back(run.pieces)
                self._fail(_unexpected(run.part.blob, run.extent, error))
                return None
            if lease is None:
                self._refused_until_s = time.monotonic() + _REFUSED_S
                self._claims.put_back(run.pieces)
                return None
            return self._begin(run, lease, for_reader)

    def run(self, job: Job, deadline_s: float) -> None:
        """Do a claimed job, on a thread of the engine."""
        try:
            if job.is_fresh and (job.from_store or not self._source_brings):
                populate(job.lease.view)
                job.is_fresh = False
            if job.from_store:
                self._read_store(job)
            else:
                job.fetch(self.source, deadline_s)
                self._keep(job)
        except WeightstreamError as error:
            self._fail(error)
        except Exception as error:  # a bug, or a landing that failed: the reader must hear of it
            self._fail(_unexpected(job.blob, job.extent, error))
        finally:
            self._finish(job)

    # What jobs call

    def arrived(self, job: Job, extent: Extent) -> None:
        """Hear from a job that bytes are valid; wakes readers whose bytes they are."""
        source = "store" if job.from_store else self.source.name
        self._meter.add(source, len(extent))
        metrics.FETCHED_BYTES.labels(source).inc(len(extent))
        job.part.landing.landed(extent)
        for piece in job.pieces:
            if piece.extent.start < extent.stop:
                piece.landed_to = max(piece.landed_to, min(extent.stop, piece.extent.stop))
        if self._waiters:
            with self._changed:
                self._changed.notify_all()

    def retried(self, error: WeightstreamError, wait_s: float) -> None:
        """Hear from a job that it asks again; a throttled origin is left alone for that long."""
        self._meter.retries += 1
        if isinstance(error, ThrottledError):
            self.throttled = True
            self.quiet_until_s = max(self.quiet_until_s, time.monotonic() + wait_s)

    def planned(self, plan: Plan) -> None:
        """Hear that the source was told what is wanted; the plan ends with the flow."""
        with self._lock:
            late = self.stopping
            self._plan = None if late else plan
        if late:
            plan.close()

    def hedged(self) -> None:
        """Count a hedge."""
        self._meter.hedges += 1
        metrics.HEDGES.inc()

    # Claiming

    def _reserve(self, run: Run) -> Lease | None:
        """Ask the landing for memory; a queued write-back gives way to a load that has none.

        Not to a fill in the background: that one exists to be written, unless a reader waits for
        this very range. And not to a landing whose reader is behind: memory is not what it lacks.
        """
        landing = run.part.landing
        lease = landing.reserve(run.extent)
        behind = isinstance(landing, HoldsBack) and landing.holds_back
        patient = behind or all(p.priority is Priority.BACKGROUND for p in run.pieces)
        if lease is None and not patient and self._write_back.shed():
            lease = landing.reserve(run.extent)
        return lease

    def _begin(self, run: Run, lease: Lease, for_reader: bool) -> Job | None:
        job = Job(self, run, lease, for_reader)  # pyright: ignore[reportArgumentType]
        with self._lock:
            if not self.stopping:
                for piece in run.pieces:
                    piece.stage = Stage.RUNNING
                self.jobs.add(job)
                return job
        self._claims.put_back(run.pieces)
        lease.release()
        return None

    # Doing

    def _read_store(self, job: Job) -> None:
        """Read a piece from the store; what cannot be read is left for `_finish` to put back."""
        (piece,) = job.pieces
        stored = job.part.stored
        assert stored is not None
        offset = piece.extent.start - stored.chunk(piece.chunk).start
        try:
            if not stored.read_into(piece.chunk, offset, job.lease.view):
                return  # it failed its hash and is EMPTY now
        except StoreError as error:
            self._write_back.pause(str(error))
            piece.alone = True
            return
        if (check := self._checks.get(job.part)) is not None:
            check.sum(piece.sums, job.lease.view)
        job.position = len(job.extent)
        self.arrived(job, job.extent)

    def _keep(self, job: Job) -> None:
        """Sum what arrived, and offer whole locked chunks to the write-back."""
        check, stored = self._checks.get(job.part), job.part.stored
        owner = self if job.part.landing.exposes_memory else None
        for piece in job.pieces:
            begin = piece.extent.start - job.extent.start
            view = job.lease.view[begin : begin + len(piece.extent)]
            if check is not None:
                check.sum(piece.sums, view)
            if piece.locked and self._store is not None and stored is not None:
                piece.locked = False
                lease = job.lease if len(job.pieces) == 1 else _Slice(job.lease, view)
                crc = piece.sums.crc64nvme
                self._write_back.offer(owner, self._store, stored, piece.chunk, lease, crc)

    def _finish(self, job: Job) -> None:
        for piece in job.pieces:
            unlock(piece)
        try:
            job.lease.release()
        except Exception as error:  # `close` waits for this job whatever happens
            self._fail(_unexpected(job.blob, job.extent, error))
        if job.from_store and not job.position:
            self._claims.put_back(job.pieces)  # last: the next moment they are another job's
        with self._changed:
            self.jobs.discard(job)
            if job.position == len(job.extent):
                self._landed(job)
            self._changed.notify_all()

    def _landed(self, job: Job) -> None:
        self.job_seconds.append(time.monotonic() - job.begun_s)
        for piece in job.pieces:
            piece.stage = Stage.LANDED
        self._left -= len(job.pieces)
        metrics.FETCHED_RANGES.labels("store" if job.from_store else self.source.name).inc()

    def _fail(self, error: WeightstreamError) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            jobs = list(self.jobs)
            self._changed.notify_all()
        for job in jobs:
            job.cancel()

    # Waiting and judging

    def _wait_until(self, done: Callable[[], bool], timeout_s: float | None) -> None:
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            self._waiters += 1
            try:
                while not done():
                    if self._error is not None:
                        raise self._error
                    if self.stopping:
                        raise LoadCancelled("the load was closed")
                    left = None if until is None else until - time.monotonic()
                    if left is not None and left <= 0:
                        raise TimeoutError(f"the bytes did not land within {timeout_s} s")
                    self._changed.wait(left)
            finally:
                self._waiters -= 1

    def _ask(self) -> None:
        for check in self._checks.values():
            if self.stopping and self._left:
                break  # there will be no verdict
            check.ask()

    def _judge(self) -> dict[Part, WeightstreamError]:
        """Compare the checksums, once; return what is wrong. Whoever else asks waits for it."""
        with self._judging:
            if self._wrong is None:
                until_s = time.monotonic() + ANSWER_WAIT_S
                wrong: dict[Part, WeightstreamError] = {}
                for part, check in self._checks.items():
                    sums = [(piece.sums, len(piece.extent)) for piece in part.pieces]
                    if (error := check.verdict(sums, until_s)) is not None:
                        wrong[part] = error
                        refute(self.source, part.blob)
                self._wrong = wrong
            return self._wrong

    def _part_with_store(self) -> None:
        """Hand the stored blobs to the write-back, which closes them when it is done."""
        wrong = {} if self._left else self._judge()
        for part in self._parts:
            if part.stored is None:
                continue
            if part.keep and self._store is not None:
                self._write_back.finish(self._store, part.stored, part not in wrong)
            else:
                part.stored.close()


def _unexpected(blob: Blob, extent: Extent, error: Exception) -> WeightstreamError:
    """Log what nobody raises on purpose, and return what the reader gets to hear."""
    log.error("unexpected, at %s %s", blob.uri, extent, exc_info=error)
    wrapped = WeightstreamError(f"{blob.uri} {extent}: {error!r}")
    wrapped.__cause__ = error
    return wrapped


class _Slice:
    """One chunk of a lease that several share."""

    def __init__(self, lease: Lease, view: memoryview) -> None:
        self.view = view
        self.hold = lease.hold
        self.release = lease.release
