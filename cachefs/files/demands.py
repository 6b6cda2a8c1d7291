"""Chunks that a read waits for and no fill brings: a flow for each run of them.

Where a file is not filled (no store, `fill=off`), a few chunks behind the demanded ones come with
them: somebody who reads on should not wait for the network at every chunk.
"""

import threading
from collections.abc import Callable, Sequence
from itertools import count, groupby

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.fetch import Engine, Flow, Landing, Priority, Wanted
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.files.held import Held
from weightstream.cachefs.store import Store
from weightstream.errors import WeightstreamError

_AHEAD_CHUNKS = 4

Ended = Callable[[Held, Extent, WeightstreamError | None], None]


class Demands:
    """The demanded chunks of one `Content`. Thread-safe; each flow is joined by a thread."""

    def __init__(
        self,
        engine: Engine,
        source: Source,
        store: Store | None,
        landing_of: Callable[[Held], Landing],
        is_here: Callable[[Held, int], bool],
        ended: Ended,
        *,
        reads_ahead: bool,
    ) -> None:
        self._engine = engine
        self._source = source
        self._store = store
        self._landing_of = landing_of
        self._is_here = is_here
        self._ended = ended
        self._ahead = _AHEAD_CHUNKS if reads_ahead else 0
        self._lock = threading.Lock()
        self._flows: set[Flow] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._flows)

    def fetch(self, held: Held, chunks: Sequence[int]) -> None:
        """Have chunks fetched before everything else, unless they are coming; returns at once."""
        with self._lock:
            alone = [i for i in chunks if i not in held.demands]
            held.demands.update(alone)
        steps = count()
        for _, run in groupby(alone, key=lambda i: i - next(steps)):
            self._begin(held, list(run))

    def close(self) -> None:
        """End all; when it returns, nothing of them lands any more."""
        with self._lock:
            self._closed = True
            flows = list(self._flows)
        for flow in flows:
            flow.close()

    def _begin(self, held: Held, run: list[int]) -> None:
        wanted = [self._wanted(held, run, Priority.DEMAND)]
        coming = self._coming(held, run[-1])
        if coming:
            wanted.append(self._wanted(held, coming, Priority.PLANNED))
        try:
            flow = self._engine.start(wanted, self._source, self._store)
        except WeightstreamError as error:
            self._end(held, [*run, *coming], error)
            return
        with self._lock:
            self._flows.add(flow)
            closed = self._closed
        if closed:
            flow.close()
        threading.Thread(
            target=self._join,
            args=(held, [*run, *coming], flow),
            daemon=True,
            name="weightstream-demand",
        ).start()

    def _coming(self, held: Held, last: int) -> list[int]:
        """Claim the chunks behind `last` that are worth bringing along."""
        ahead = range(last + 1, min(last + 1 + self._ahead, held.n_chunks))
        lacking = [i for i in ahead if not self._is_here(held, i)]
        with self._lock:
            coming = [i for i in lacking if i not in held.demands]
            held.demands.update(coming)
        return coming

    def _wanted(self, held: Held, chunks: Sequence[int], priority: Priority) -> Wanted:
        extents = tuple(held.chunk(i) for i in chunks)
        return Wanted(held.blob, self._landing_of(held), extents, priority)

    def _join(self, held: Held, chunks: list[int], flow: Flow) -> None:
        error: WeightstreamError | None = None
        try:
            with flow:
                flow.join()
        except WeightstreamError as failure:
            error = failure
        finally:
            with self._lock:
                self._flows.discard(flow)
        self._end(held, chunks, error)

    def _end(self, held: Held, chunks: Sequence[int], error: WeightstreamError | None) -> None:
        with self._lock:
            held.demands.difference_update(chunks)
        held.rest()
        span = Extent(held.chunk(min(chunks)).start, held.chunk(max(chunks)).stop)
        self._ended(held, span, error)
