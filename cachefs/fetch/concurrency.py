"""Pure policy: how many ranges to have in flight, from what the last window showed.

Hill climbing: double while that brings a quarter more, step back when it does not and stay for a
while; halve when the origin asks for less. A window is judged only when every slot was in use,
because an idle slot says nothing about the link.
"""

from dataclasses import dataclass, replace

START = 4
_GAIN = 1.25
_HOLD_WINDOWS = 20
_THROTTLED_WINDOWS = 25


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen since the last decision."""

    rate_bytes_s: float
    saturated: bool
    throttled: bool


@dataclass(frozen=True, slots=True)
class Concurrency:
    """The state between two windows; `target` is the number of ranges to have in flight."""

    target: int = START
    limit: int = 32
    settled_rate_bytes_s: float = 0.0
    settled_target: int = 0
    hold_windows: int = 0
    settling: bool = False

    def after(self, window: Window) -> "Concurrency":
        """Return the next state."""
        if window.throttled:
            return replace(
                self,
                target=max(1, self.target // 2),
                settled_target=0,
                settled_rate_bytes_s=0.0,
                hold_windows=_THROTTLED_WINDOWS,
                settling=False,
            )
        if self.hold_windows:
            return replace(self, hold_windows=self.hold_windows - 1)
        if self.settling:
            return replace(self, settling=False)
        if not window.saturated:
            return self
        if window.rate_bytes_s >= self.settled_rate_bytes_s * _GAIN:
            return self._climb(window.rate_bytes_s)
        return self._step_back()

    def _climb(self, rate_bytes_s: float) -> "Concurrency":
        return replace(
            self,
            target=min(self.limit, self.target * 2),
            settled_target=self.target,
            settled_rate_bytes_s=rate_bytes_s,
            settling=True,
        )

    def _step_back(self) -> "Concurrency":
        """Return to where the last gain was seen; forget the rate, so that it is measured anew."""
        return replace(
            self,
            target=self.settled_target or self.target,
            settled_target=0,
            settled_rate_bytes_s=0.0,
            hold_windows=_HOLD_WINDOWS,
        )
