"""Models that the agent was asked to bring into the store: one job for each URI."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from weightstream import metrics
from weightstream.cachefs.fetch import Progress
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.prefetch import PrefetchReport, prefetch
from weightstream.cachefs.store import Store
from weightstream.errors import LoadCancelled, UsageError, WeightstreamError
from weightstream.settings import Settings

_MOST_JOBS = 64
_END_S = 2.0

SourceUnder = Callable[[str], Source | None]
"""Where to read what lies under a URI; None: its origin."""


@dataclass(eq=False, slots=True)
class Prefetch:
    """One job, shared by whoever asks for the same URI."""

    uri: str
    done: threading.Event = field(default_factory=threading.Event)
    progress: Progress | None = None
    report: PrefetchReport | None = None
    error: WeightstreamError | None = None
    users: int = 0
    cancelled: bool = False


class Prefetches:
    """Runs jobs, each on a thread; ends one that nobody waits for any more. Thread-safe."""

    def __init__(self, settings: Settings, store: Store, source_under: SourceUnder) -> None:
        self._settings = settings
        self._store = store
        self._source_under = source_under
        self._lock = threading.Lock()
        self._jobs: dict[str, Prefetch] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def join(self, uri: str) -> Prefetch:
        """Return the job that brings `uri`, begun if there is none; `leave` it afterwards."""
        uri = uri.rstrip("/")
        with self._lock:
            if self._closed:
                raise LoadCancelled("the agent is ending")
            job = self._jobs.get(uri)
            if job is None:
                if len(self._jobs) >= _MOST_JOBS:
                    raise UsageError(f"{uri}: {_MOST_JOBS} prefetches run already")
                job = self._begin(uri)
            job.users += 1
            return job

    def leave(self, job: Prefetch) -> None:
        """Say that one who asked does not wait any more; without others the job ends."""
        with self._lock:
            job.users -= 1
            if job.users == 0 and not job.done.is_set():
                job.cancelled = True
                if self._jobs.get(job.uri) is job:
                    del self._jobs[job.uri]

    def running(self) -> tuple[Prefetch, ...]:
        """Return the jobs that run now."""
        with self._lock:
            return tuple(self._jobs.values())

    def close(self) -> None:
        """End all jobs; wait for them a little."""
        with self._lock:
            self._closed = True
            for job in self._jobs.values():
                job.cancelled = True
            threads = list(self._threads)
        for thread in threads:
            thread.join(_END_S / max(1, len(threads)))

    def _begin(self, uri: str) -> Prefetch:
        job = self._jobs[uri] = Prefetch(uri)
        thread = threading.Thread(
            target=self._run, args=(job,), daemon=True, name="weightstream-prefetch"
        )
        self._threads.add(thread)
        thread.start()
        return job

    def _run(self, job: Prefetch) -> None:
        def told(progress: Progress) -> None:
            job.progress = progress
            if job.cancelled:
                raise LoadCancelled(f"{job.uri}: nobody waits for the prefetch any more")

        outcome = "failed"
        try:
            source = self._source_under(job.uri)
            job.report = prefetch(job.uri, self._settings, self._store, told, source=source)
            outcome = "done"
        except LoadCancelled as error:
            job.error, outcome = error, "cancelled"
        except WeightstreamError as error:
            job.error = error
        except Exception as error:  # a bug: whoever asked must hear of it
            job.error = WeightstreamError(f"{job.uri}: internal error: {error!r}")
            raise
        finally:
            metrics.AGENT_PREFETCHES.labels(outcome).inc()
            with self._lock:
                if self._jobs.get(job.uri) is job:
                    del self._jobs[job.uri]
                self._threads.discard(threading.current_thread())
            job.done.set()
