"""How fast each peer gives, and the origin: bytes over the time in which they were to send."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from weightstream.p2p.schedule import ORIGIN, Pace

_MEMORY_S = 3.0
"""After this much asking the past counts half: a peer that turns slow is found within seconds."""


class Paces:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Pace] = {}
        self._open: dict[str, int] = {}
        self._since_s: dict[str, float] = {}

    def begin(self, node: str) -> None:
        """Say that `node` begins to send. What it waits for itself is not its slowness: a home
        that is asked for its second chunk while it reads its first would look ten times slower."""
        with self._lock:
            self._settle(node)
            self._open[node] = self._open.get(node, 0) + 1

    @contextmanager
    def asked(self, node: str) -> Iterator[None]:
        """Say that `node` is to send while the block runs."""
        self.begin(node)
        try:
            yield
        finally:
            self.end(node)

    def got(self, node: str, count: int) -> None:
        """Say that `node` gave `count` bytes."""
        with self._lock:
            self._settle(node)
            pace = self._known[node]
            self._known[node] = Pace(pace.got_bytes + count, pace.busy_s)

    def end(self, node: str) -> None:
        """Say that an answer is over."""
        with self._lock:
            self._settle(node)
            self._open[node] -= 1

    def forget(self, node: str) -> None:
        """Judge it anew."""
        with self._lock:
            self._settle(node)
            self._known[node] = Pace()

    def now(self) -> Mapping[str, Pace]:
        """Return the pace of everybody who was asked lately."""
        with self._lock:
            for node in tuple(self._known):
                self._settle(node)
            return dict(self._known)

    def sending(self) -> tuple[float, int]:
        """Return how many bytes a second come from those peers that send now, and in how many
        answers."""
        with self._lock:
            nodes = [node for node, count in self._open.items() if count and node != ORIGIN]
            rate_bytes_s = sum(self._known[node].rate_bytes_s for node in nodes)
            return rate_bytes_s, sum(self._open[node] for node in nodes)

    def _settle(self, node: str) -> None:
        now_s = time.monotonic()
        pace = self._known.setdefault(node, Pace())
        if self._open.get(node):
            pace = Pace(pace.got_bytes, pace.busy_s + now_s - self._since_s.get(node, now_s))
        if pace.busy_s > _MEMORY_S:
            pace = Pace(pace.got_bytes // 2, pace.busy_s / 2)
        self._known[node] = pace
        self._since_s[node] = now_s
