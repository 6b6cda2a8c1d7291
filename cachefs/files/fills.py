"""Fills: whole files fetched behind their readers, and the shards behind those.

A fill is a flow over all that is missing of one file, in the background: its ranges wait for memory
and for the disk, unless a reader waits for one of them, which then goes before everything else. Two
run at once, so that the end of one file is not a pause; the older one has precedence.

Fills exist to complete files: what the write-back skipped is fetched again, a few times.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.fetch import Engine, Flow, Landing, Priority, Wanted
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.files.held import Held
from weightstream.cachefs.files.policy import fill_order
from weightstream.cachefs.store import Store
from weightstream.errors import IntegrityError, StoreError, WeightstreamError

if TYPE_CHECKING:
    from weightstream.cachefs.files.tree import File

log = logging.getLogger(__name__)

_AT_ONCE = 2
_ATTEMPTS = 3
_REST_S = 10.0
"""After a fill that failed or found no room, reads are served alone for so long."""


@dataclass(slots=True, eq=False)
class Fill:
    """One file that is being filled."""

    held: Held
    stage: Literal["starting", "fetching", "sealing"] = "starting"
    done: threading.Event = field(default_factory=threading.Event)
    error: WeightstreamError | None = None

    def ends_within(self, seconds: float) -> bool:
        """Guess whether it will be done by then, from its rate so far."""
        flow = self.held.flow
        if self.stage != "fetching" or flow is None:
            return self.stage == "sealing"
        now = flow.progress()
        return now.bytes_total - now.bytes_done <= now.rate_bytes_s * seconds


class Fills:
    """Starts, runs and counts the fills of one `Content`. Thread-safe.

    Flows are made on the fills' own threads: to make room in the store may take a while.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        store: Store,
        landing_of: Callable[[Held], Landing],
        hold: Callable[["File"], Held],
        ended: Callable[[Fill], None],
    ) -> None:
        self._engine = engine
        self._source = source
        self._store = store
        self._landing_of = landing_of
        self._hold = hold
        self._ended = ended
        self._lock = threading.Lock()
        self._running: dict[str, Fill] = {}
        self._queue: deque[File] = deque()
        self._rests_until_s: dict[str, float] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    def of(self, blob_id: str) -> Fill | None:
        """Return the fill of a blob that runs now."""
        return self._running.get(blob_id)

    def begin(self, held: Held, behind: Sequence["File"]) -> None:
        """Fill a file that is being read, now, and `behind` after it; returns at once."""
        with self._lock:
            names = {file.path for file in behind}
            rest = [file for file in self._queue if file.path not in names]
            self._queue = deque([*behind, *rest])
        self._start(held)
        self._start_queued()

    def is_wanted(self, held: Held) -> bool:
        """Say whether a fill of this file would do something."""
        blob_id = held.blob.id
        if self._closed or blob_id in self._running or held.stored is None:
            return False
        if time.monotonic() < self._rests_until_s.get(blob_id, 0.0):
            return False
        return not held.stored.complete

    def close(self, longest_s: float) -> None:
        """End all; returns when no fill's thread runs any more, or after `longest_s`."""
        with self._lock:
            self._closed = True
            self._queue.clear()
            running, threads = list(self._running.values()), list(self._threads)
        for fill in running:
            if (flow := fill.held.flow) is not None:
                flow.close()
        until_s = time.monotonic() + longest_s
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))

    # Starting

    def _start(self, held: Held) -> None:
        fill = Fill(held)
        with self._lock:
            if self._closed or held.blob.id in self._running:
                return
            self._running[held.blob.id] = fill
        thread = threading.Thread(
            target=self._run, args=(fill,), daemon=True, name="weightstream-fill"
        )
        with self._lock:
            self._threads.add(thread)
        thread.start()

    def _start_queued(self) -> None:
        while True:
            with self._lock:
                if self._closed or not self._queue or len(self._running) >= _AT_ONCE:
                    return
                file = self._queue.popleft()
            held = self._hold(file)
            if self.is_wanted(held):
                self._start(held)

    def _flow(self, held: Held) -> Flow | None:
        """Return a flow over what is missing, or None when nothing is; raises when it cannot be."""
        assert held.stored is not None
        missing = held.stored.holes()
        if not missing:
            return None
        self._make_room(held, sum(len(extent) for extent in missing))
        wanted = Wanted(
            held.blob, self._landing_of(held), _ordered(held, missing), Priority.BACKGROUND
        )
        return self._engine.start([wanted], self._source, self._store)

    def _make_room(self, held: Held, needed_bytes: int) -> None:
        if self._store.room_bytes() < needed_bytes:
            self._store.evict(needed_bytes)
        room = self._store.room_bytes()
        if room < needed_bytes:
            raise StoreError(
                f"{held.blob.uri} is not filled: {needed_bytes} bytes are missing, "
                f"{self._store.path} has room for {max(0, room)}"
            )

    # Running

    def _run(self, fill: Fill) -> None:
        try:
            self._fill(fill)
        except WeightstreamError as error:
            fill.error = error
        except Exception as error:  # a bug: the queue must go on
            log.exception("unexpected, filling %s", fill.held.blob.uri)
            fill.error = WeightstreamError(f"{fill.held.blob.uri}: {error!r}")
        finally:
            self._end(fill)

    def _fill(self, fill: Fill) -> None:
        held = fill.held
        for _ in range(_ATTEMPTS):
            flow = None if self._closed else self._flow(held)
            if flow is None:
                break
            held.flow, fill.stage = flow, "fetching"
            with flow:
                if self._closed:
                    return
                flow.join()
            fill.stage = "sealing"
            self._await_disk(held)
        if held.stored is not None and not held.stored.complete and not held.stored.holes():
            held.stored.verify()  # all of it was there, but nobody had looked yet: hash and seal

    def _await_disk(self, held: Held) -> None:
        """Wait until the write-back is done with the file, as long as the disk gets anywhere."""
        stored, before = held.stored, -1
        while stored is not None and not self._closed:
            if self._engine.write_back.wait(stored, self._engine.settings.deadline_s):
                return
            if (now := stored.present_bytes()) == before:
                raise StoreError(f"{held.blob.uri}: the disk of {self._store.path} hangs")
            before = now

    def _end(self, fill: Fill) -> None:
        held = fill.held
        with self._lock:
            self._running.pop(held.blob.id, None)
            self._threads.discard(threading.current_thread())
            complete = held.stored is not None and held.stored.complete
            if not complete:
                self._rests_until_s[held.blob.id] = time.monotonic() + _REST_S
            else:
                self._rests_until_s.pop(held.blob.id, None)
        held.flow = None
        if fill.error is not None:
            level = logging.ERROR if isinstance(fill.error, IntegrityError) else logging.INFO
            log.log(level, "not filled: %s", fill.error)
        fill.done.set()
        self._ended(fill)
        self._start_queued()


def _ordered(held: Held, missing: Sequence[Extent]) -> tuple[Extent, ...]:
    """Return the missing chunks in the order in which readers will want them.

    Without those that a read has fetched on its own: the next attempt finds them in the store.
    """
    absent = {i for extent in missing for i in held.chunks_of(extent)}
    absent = absent - held.demands or absent
    order = fill_order(held.n_chunks, held.first_chunk, held.order.chunks(held.file.name))
    return tuple(held.chunk(i) for i in order if i in absent)
