"""To whom one chunk is being sent, and how far each of them is."""

import threading
import time

from weightstream.p2p.schedule import scattered


class Passing:
    """Thread-safe. Bulk only: faults go before it anyway."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._lock = threading.Lock()
        self._sent: dict[str, int] = {}
        self._told: set[str] = set()
        self._sum_bytes = 0
        self._began_s = 0.0

    def sent(self, node: str, count: int) -> None:
        """Say that `node` was sent the first `count` bytes."""
        with self._lock:
            self._began_s = self._began_s or time.monotonic()
            self._sum_bytes += count - self._sent.get(node, 0)
            self._sent[node] = count

    def ended(self, node: str) -> None:
        """Say that it is not being sent to `node` any more."""
        with self._lock:
            self._sent.pop(node, None)

    def scatter(self) -> tuple[str, ...]:
        """Return who is to share the rest among themselves, each once; nobody: all goes well."""
        with self._lock:
            seconds = time.monotonic() - self._began_s
            rate_bytes_s = self._sum_bytes / seconds if seconds > 0 else 0.0
            sent = {node: count for node, count in self._sent.items() if node not in self._told}
            receivers = scattered(sent, self._total_bytes, rate_bytes_s)
            self._told.update(receivers)
            return receivers
