"""How far a flow is: a frozen snapshot for progress bars, reports and metrics."""

import threading
import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of one flow, as of `elapsed_s` after its start. Times are None until they happened."""

    bytes_done: int
    bytes_total: int
    bytes_by_source: dict[str, int] = field(default_factory=dict)
    elapsed_s: float = 0.0
    first_byte_s: float | None = None
    last_byte_s: float | None = None
    retries: int = 0
    hedges: int = 0

    @property
    def rate_bytes_s(self) -> float:
        """Return the mean rate since the first byte."""
        end = self.last_byte_s if self.last_byte_s is not None else self.elapsed_s
        busy = end - (self.first_byte_s or 0.0)
        return self.bytes_done / busy if busy > 0 else 0.0


class Meter:
    """Counts what arrives; thread-safe."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self.retries = 0
        self.hedges = 0
        self._by_source: dict[str, int] = {}
        self._begun = time.monotonic()
        self._first: float | None = None
        self._last: float | None = None
        self._lock = threading.Lock()

    def add(self, source: str, count: int) -> None:
        """Count bytes that have just arrived."""
        now = time.monotonic()
        with self._lock:
            self.done_bytes += count
            self._by_source[source] = self._by_source.get(source, 0) + count
            self._first = self._first if self._first is not None else now
            if self.done_bytes >= self.total_bytes:
                self._last = now

    def snapshot(self) -> Progress:
        """Return where the flow is now."""
        with self._lock:
            return Progress(
                bytes_done=self.done_bytes,
                bytes_total=self.total_bytes,
                bytes_by_source=dict(self._by_source),
                elapsed_s=time.monotonic() - self._begun,
                first_byte_s=self._since_begun(self._first),
                last_byte_s=self._since_begun(self._last),
                retries=self.retries,
                hedges=self.hedges,
            )

    def _since_begun(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self._begun
