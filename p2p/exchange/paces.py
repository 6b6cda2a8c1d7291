"""How fast each peer gives: bytes over the time in which something was asked of it."""

import threading
import time
from collections.abc import Mapping

from weightstream.p2p.schedule import Pace

_MEMORY_S = 2.0
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

    def now(self) -> Mapping[str, Pace]:
        """Return the pace of everybody who was asked lately."""
        with self._lock:
            for node in tuple(self._known):
                self._settle(node)
            return dict(self._known)

    def _settle(self, node: str) -> None:
        now_s = time.monotonic()
        pace = self._known.setdefault(node, Pace())
        if self._open.get(node):
            pace = Pace(pace.got_bytes, pace.busy_s + now_s - self._since_s.get(node, now_s))
        if pace.busy_s > _MEMORY_S:
            pace = Pace(pace.got_bytes // 2, pace.busy_s / 2)
        self._known[node] = pace
        self._since_s[node] = now_s
