"""What a load did and when: for the command line, metrics and benchmarks."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from weightstream.cachefs.fetch import Flow, Progress

ProgressCallback: TypeAlias = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The phases of one load, in seconds since its start; None for what did not happen."""

    uri: str
    tensors: int
    bytes_total: int
    bytes_by_source: Mapping[str, int]
    """`origin`, `store` (read), `mapped` (neither read nor copied), `peer`."""
    resolve_s: float
    """The files and their versions are known."""
    header_s: float
    """Every header is read and the plan made."""
    first_byte_s: float | None
    last_byte_s: float | None
    settle_s: float | None
    """The write-back no longer needs the tensors' memory."""
    ready_s: float
    """The tensors are the caller's."""
    retries: int = 0
    hedges: int = 0


@dataclass(slots=True)
class Stopwatch:
    """Collects a report, and feeds the progress callback, while a load runs."""

    uri: str
    callback: ProgressCallback | None = None
    begun_s: float = field(default_factory=time.monotonic)
    mapped_bytes: int = 0
    resolve_s: float = 0.0
    header_s: float = 0.0
    settle_s: float | None = None
    first_byte_s: float | None = None
    last_byte_s: float | None = None
    _fetched: Progress | None = None

    def now_s(self) -> float:
        """Return the seconds since the load began."""
        return time.monotonic() - self.begun_s

    def tell(self, flow: Flow | None) -> None:
        """Tell the callback how far the load is."""
        if self.callback is not None:
            self.callback(self._progress(flow.progress() if flow else self._fetched))

    def end_flow(self, flow: Flow, began_s: float) -> None:
        """Take over what a finished flow measured; `began_s` is when it was started."""
        done = flow.progress()
        self._fetched = done
        if done.first_byte_s is not None:
            self.first_byte_s = began_s + done.first_byte_s
        if done.last_byte_s is not None:
            self.last_byte_s = began_s + done.last_byte_s

    def report(self, tensors: int) -> LoadReport:
        """Return the report of the load, which is ready now."""
        total = self._progress(self._fetched)
        return LoadReport(
            uri=self.uri,
            tensors=tensors,
            bytes_total=total.bytes_total,
            bytes_by_source=total.bytes_by_source,
            resolve_s=self.resolve_s,
            header_s=self.header_s,
            first_byte_s=self.first_byte_s,
            last_byte_s=self.last_byte_s,
            settle_s=self.settle_s,
            ready_s=self.now_s(),
            retries=total.retries,
            hedges=total.hedges,
        )

    def _progress(self, fetched: Progress | None) -> Progress:
        """Return a flow's progress with the mapped bytes on top."""
        base = fetched or Progress(0, 0, elapsed_s=self.now_s())
        if not self.mapped_bytes:
            return base
        return replace(
            base,
            bytes_done=base.bytes_done + self.mapped_bytes,
            bytes_total=base.bytes_total + self.mapped_bytes,
            bytes_by_source={**base.bytes_by_source, "mapped": self.mapped_bytes},
        )
