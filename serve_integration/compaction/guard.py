"""When a plan may be acted on: only on a fleet that has stood still, not too often, and later after
each failure. Pure: a state, the clock passed in, a new state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Pace:
    """The waits, in seconds."""

    stable_s: float = 300.0
    """Every deployment healthy and at its target for that long; Ray's own default."""
    cooldown_s: float = 30.0
    """After a node was emptied."""
    backoff_s: float = 30.0
    """After a failure; twice that after the second in a row, and so on."""
    backoff_max_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Guard:
    """What there is to remember between two looks at the fleet."""

    stable_since: float | None = None
    not_before: float = 0.0
    failures: int = 0
    """In a row."""

    def seen(self, now: float, stable: bool) -> "Guard":
        """Return the state after a look at the fleet."""
        if not stable:
            return replace(self, stable_since=None)
        return self if self.stable_since is not None else replace(self, stable_since=now)

    def wait_s(self, now: float, pace: Pace) -> float:
        """Return how long nothing may be done yet; infinite while the fleet changes."""
        if self.stable_since is None:
            return float("inf")
        return max(0.0, self.stable_since + pace.stable_s - now, self.not_before - now)

    def succeeded(self, now: float, pace: Pace) -> "Guard":
        """Return the state after a node was emptied."""
        return replace(self, failures=0, not_before=now + pace.cooldown_s)

    def failed(self, now: float, pace: Pace) -> "Guard":
        """Return the state after a node could not be emptied."""
        wait_s = pace.backoff_s * 2.0 ** min(self.failures, 60)
        not_before = now + min(wait_s, pace.backoff_max_s)
        return replace(self, failures=self.failures + 1, not_before=not_before)


@dataclass(frozen=True, slots=True)
class Peaks:
    """How many replicas each workload had lately: the scaler may want as many again."""

    seen: tuple[tuple[float, Mapping[str, int]], ...] = ()
    """(time, counts) of each change, the oldest first; each holds until the next."""

    def noted(self, now: float, counts: Mapping[str, int], look_back_s: float) -> "Peaks":
        """Return the history with the counts of now, without what is too old."""
        seen = self.seen
        if not seen or seen[-1][1] != counts:
            seen = (*seen, (now, dict(counts)))
        ends = [at for at, _ in seen[1:]] + [float("inf")]
        kept = zip(seen, ends, strict=True)
        return Peaks(tuple(one for one, end in kept if end >= now - look_back_s))

    def above(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return how many more than now the workloads of now had at their highest."""
        highest = {
            name: max(before.get(name, 0) for _, before in self.seen) if self.seen else 0
            for name in counts
        }
        return {name: most - counts[name] for name, most in highest.items() if most > counts[name]}
