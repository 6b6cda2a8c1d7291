"""To whom one chunk is being sent, and how far each of them is."""

import itertools
import threading
import time

from weightstream.p2p.schedule import scattered

_LOOK_S = 0.05
"""Each piece that is sent could ask: with eight receivers 200 times a second."""


class Passing:
    """Thread-safe. Bulk only: faults go before it anyway."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._nodes: dict[int, str] = {}
        self._sent: dict[int, int] = {}
        self._told: set[str] = set()
        self._sum_bytes = 0
        self._began_s = self._look_s = 0.0

    def begin(self, node: str) -> int:
        """Say that an answer to `node` begins; return the answer's number."""
        with self._lock:
            if not self._sent:
                self._sum_bytes, self._began_s = 0, time.monotonic()
            number = next(self._numbers)
            self._nodes[number], self._sent[number] = node, 0
            return number

    def sent(self, number: int, count: int) -> None:
        """Say that an answer has come to `count` bytes."""
        with self._lock:
            self._sum_bytes += count - self._sent[number]
            self._sent[number] = count

    def end(self, number: int) -> None:
        """Say that an answer is over, whatever came of it."""
        with self._lock:
            del self._nodes[number], self._sent[number]

    def is_due(self) -> bool:
        """Say that it is time to look whether all goes well."""
        with self._lock:
            now_s = time.monotonic()
            due = now_s >= self._look_s
            if due:
                self._look_s = now_s + _LOOK_S
            return due

    def scatter(self, position: int) -> tuple[str, ...]:
        """Return who is to share the rest among themselves, of a chunk that is here up to
        `position`; nobody: all goes well."""
        with self._lock:
            seconds = time.monotonic() - self._began_s
            rate_bytes_s = self._sum_bytes / seconds if seconds > 0 else 0.0
            sent: dict[str, int] = {}
            for number, node in self._nodes.items():
                if node not in self._told:
                    sent[node] = min(self._sent[number], sent.get(node, self._total_bytes))
            return scattered(sent, position, self._total_bytes, rate_bytes_s)

    def tell(self, receivers: tuple[str, ...]) -> bool:
        """Hear who is to be told; False when one of them was a moment ago: nobody is told twice."""
        with self._lock:
            is_new = self._told.isdisjoint(receivers)
            if is_new:
                self._told.update(receivers)
            return is_new
