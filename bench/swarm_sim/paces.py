"""How fast one peer gives, by the simulator's clock; forgets as the exchange does."""

from collections.abc import Iterator, Mapping

from weightstream.p2p.schedule import Pace, is_slow

_MEMORY_S = 3.0
JUDGED_S = 1.5
"""Nobody is judged, and nothing broken off, sooner."""


class Asked:
    """What one node got of one peer."""

    __slots__ = ("_busy_s", "_open", "_since_s", "got_bytes")

    def __init__(self) -> None:
        self.got_bytes = 0
        self._busy_s = 0.0
        self._open = 0
        self._since_s = 0.0

    def open(self, now_s: float) -> None:
        """Say that something is asked."""
        self._settle(now_s)
        self._open += 1

    def close(self, now_s: float) -> None:
        """Say that an answer is over."""
        self._settle(now_s)
        self._open -= 1

    def pace(self, now_s: float) -> Pace:
        """Return what `is_slow` judges by."""
        self._settle(now_s)
        return Pace(self.got_bytes, self._busy_s)

    def _settle(self, now_s: float) -> None:
        if self._open:
            self._busy_s += now_s - self._since_s
        self._since_s = now_s
        if self._busy_s > _MEMORY_S:
            self.got_bytes //= 2
            self._busy_s /= 2


def slow_ones(paces: Mapping[str, Pace]) -> Iterator[str]:
    """Yield who is slow, the slowest first: after the first who is not, nobody is."""
    busy = [name for name, pace in paces.items() if pace.busy_s >= JUDGED_S]
    for name in sorted(busy, key=lambda name: paces[name].rate_bytes_s):
        if not is_slow(paces, name):
            return
        yield name
