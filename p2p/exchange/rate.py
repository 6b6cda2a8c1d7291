"""How fast something grows that only counts."""

import threading
import time
from collections import deque
from collections.abc import Callable

_OVER_S = 0.5
_STALE_S = 2.0


class Rate:
    """The rate of a counter over the last half second or more; thread-safe."""

    def __init__(self, counted: Callable[[], int]) -> None:
        self._counted = counted
        self._lock = threading.Lock()
        self._seen: deque[tuple[float, int]] = deque()

    def bytes_s(self) -> float:
        """Return the bytes a second since it was asked before, half a second ago if it was asked so
        often; 0 the first time, and after a pause."""
        with self._lock:
            now_s, count = time.monotonic(), self._counted()
            if self._seen and self._seen[-1][0] < now_s - _STALE_S:
                self._seen.clear()
            self._seen.append((now_s, count))
            while len(self._seen) > 2 and self._seen[1][0] <= now_s - _OVER_S:
                self._seen.popleft()
            since_s, before = self._seen[0]
            return (count - before) / (now_s - since_s) if now_s > since_s else 0.0
