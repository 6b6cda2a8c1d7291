"""Pure policy: which peers are too slow to wait for.

A peer is judged by the bytes that it gave over the time in which something was asked of it: a peer
that is waited for in vain counts as much as one that trickles.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

_LEAST_S = 1.5


@dataclass(frozen=True, slots=True)
class Pace:
    """What one peer gave: `busy_s` counts each second in which at least one request was open."""

    got_bytes: int = 0
    busy_s: float = 0.0

    @property
    def rate_bytes_s(self) -> float:
        """Return bytes per second of asking; 0 before the first second's fraction."""
        return self.got_bytes / self.busy_s if self.busy_s > 0 else 0.0


def is_slow(paces: Mapping[str, Pace], node: str, times: float = 4.0) -> bool:
    """Say whether `node` gives less than a `times`-th of what its peers give in the median.

    Nobody is judged before a second and a half of sending, or without two others to compare with:
    with one other it may be that one's luck.
    """
    pace = paces.get(node)
    if pace is None or pace.busy_s < _LEAST_S:
        return False
    others = [p.rate_bytes_s for n, p in paces.items() if n != node and p.busy_s >= _LEAST_S]
    if len(others) < 2:
        return False
    return pace.rate_bytes_s * times < statistics.median(others)
