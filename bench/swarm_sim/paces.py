"""How fast one peer gives, by the simulator's clock; forgets as the exchange does."""

from weightstream.p2p.schedule import Pace

_MEMORY_S = 3.0


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
