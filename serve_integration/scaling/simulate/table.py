"""What a run came to, in the numbers that decide."""

from collections.abc import Sequence
from dataclasses import dataclass

from weightstream.serve_integration.scaling.simulate.world import Run


@dataclass(frozen=True, slots=True)
class Outcome:
    """One policy's row."""

    policy: str
    accepted: int
    rejected: int
    unanswered: int
    p50_s: float
    p95_s: float
    p99_s: float
    largest: int
    changes: int
    replica_seconds: float


def outcome(run: Run) -> Outcome:
    """Return the numbers of a run; latencies are of the accepted requests."""
    return Outcome(
        policy=run.name,
        accepted=len(run.latencies_s),
        rejected=run.rejected,
        unanswered=run.unanswered,
        p50_s=percentile(run.latencies_s, 0.50),
        p95_s=percentile(run.latencies_s, 0.95),
        p99_s=percentile(run.latencies_s, 0.99),
        largest=run.largest,
        changes=run.changes,
        replica_seconds=run.replica_seconds,
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that `share` of the sorted values do not exceed; 0 of none."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
