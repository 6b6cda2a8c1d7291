"""The made-up world, in cases small enough to be worked out by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from weightstream.errors import UsageError
from weightstream.serve_integration.scaling.policy import Observed, Policy
from weightstream.serve_integration.scaling.simulate.reports import Reporting
from weightstream.serve_integration.scaling.simulate.scalers import Concurrency, RayDefault
from weightstream.serve_integration.scaling.simulate.table import outcome, percentile
from weightstream.serve_integration.scaling.simulate.traces import Request, load
from weightstream.serve_integration.scaling.simulate.world import Run, Service, ideal, run

LEAD_S = 10.0


@dataclass
class Planned:
    """Orders what a plan says for a time; the first request comes at 0."""

    plan: Callable[[float], int]
    least: int = 0
    name: str = "planned"
    reporting: Reporting = field(default_factory=lambda: Reporting(0.1, 0.5, "max"))
    seen: list[Observed] = field(default_factory=list)

    def decide(self, seen: Observed) -> int:
        self.seen.append(seen)
        return self.plan(round(seen.now_s - LEAD_S, 3))


def service(slots: int = 1, start_s: float = 5, warm_s: float = 1, waiting: int = -1) -> Service:
    return Service(slots, start_s, warm_s, waiting, tail_s=0)


def ended(
    requests: list[tuple[float, float]], scaler: Planned, of: Service | None = None
) -> tuple[list[float], Run]:
    """Return the latencies and the run of a trace of (time, duration)."""
    trace = tuple(Request(at_s, seconds) for at_s, seconds in requests)
    done = run(trace, scaler, of or service())
    return [round(one, 6) for one in done.latencies_s], done


def always(replicas: int) -> Planned:
    return Planned(lambda _: replicas, least=replicas)


def test_one_replica_serves_in_turn() -> None:
    latencies, done = ended([(0, 2), (0, 2), (0.5, 2)], always(1))
    assert latencies == [2, 4, 5.5]
    assert done.replica_seconds == pytest.approx(LEAD_S + 6, abs=0.2)
    assert (done.largest, done.changes, done.rejected, done.unanswered) == (1, 0, 0, 0)


def test_slots_are_side_by_side() -> None:
    assert ended([(0, 2), (0, 2), (0, 2)], always(1), service(slots=2))[0] == [2, 2, 4]
    assert ended([(0, 2), (0, 2), (0, 2)], always(3))[0] == [2, 2, 2]


def test_what_ends_makes_room_for_what_comes_at_the_same_time() -> None:
    assert ended([(0, 2), (2, 2)], always(1), service(waiting=0))[0] == [2, 2]


def test_a_cold_start_is_waited_for_and_the_next_is_warm() -> None:
    plan = Planned(lambda at_s: 1 if 0 <= at_s < 6.5 or at_s >= 10 else 0)
    latencies, done = ended([(0, 1), (10, 1)], plan)
    assert latencies == [1 + 1, 5 + 1]
    assert done.changes == 3
    # The clock goes on with what still runs: 6.5 s, then 1 s of start and 1 s of work.
    assert done.replica_seconds == pytest.approx(8.5, abs=0.2)


def test_one_more_than_ever_ran_is_cold() -> None:
    plan = Planned(lambda at_s: 2 if at_s >= 0 else 1, least=1)
    assert ended([(0, 10), (0, 1)], plan)[0] == [5 + 1, 10]


def test_a_bounded_queue_refuses() -> None:
    latencies, done = ended([(0, 2)] * 4, always(1), service(waiting=1))
    assert (latencies, done.rejected) == ([2, 4], 2)


def test_of_those_that_start_the_latest_is_given_back_first() -> None:
    orders = {0.0: 1, 1.0: 2}
    plan = Planned(lambda at_s: orders.get(at_s, 1 if at_s > 1 else int(at_s > 0)))
    assert ended([(0, 1), (0, 1)], plan)[0] == [6, 7]


def test_what_runs_on_a_replica_that_is_given_back_goes_on_and_takes_a_slot() -> None:
    plan = Planned(lambda at_s: 2 if at_s < 1 else 1, least=2)
    assert ended([(0, 4), (0, 4), (2, 1)], plan)[0] == [3, 4, 4]


def test_what_waits_an_hour_is_unanswered() -> None:
    latencies, done = ended([(0, 1)], always(0))
    assert (latencies, done.unanswered, done.replica_seconds) == ([], 1, 0)


def test_a_policy_is_told_what_runs_what_waits_and_how_long_starts_take() -> None:
    plan = Planned(lambda at_s: 1 if at_s >= 0 else 0)
    trace = (Request(0, 3, tokens=70), Request(0, 3, tokens=30))
    run(trace, plan, service())
    by_time = {round(one.now_s - LEAD_S, 1): one for one in plan.seen}
    waiting, working = by_time[2.0], by_time[7.0]
    assert (waiting.queued, waiting.running, waiting.ready, waiting.ordered) == (2, 0, 0, 1)
    assert (waiting.start_s, waiting.tokens) == (0, 0)
    assert (working.queued, working.running, working.ready, working.start_s) == (1, 1, 1, 5)
    assert working.tokens == 70


def test_points_tell_what_was_ordered_and_what_was_ready() -> None:
    _, done = ended([(0, 1)], Planned(lambda at_s: 1 if at_s >= 0 else 0))
    times = [(p.at_s - LEAD_S, p.ordered, p.ready, p.queued) for p in done.points]
    assert times[0] == (-LEAD_S, 0, 0, 0)
    assert next(one for one in times if one[1]) == (0, 1, 0, 1)
    assert next(one for one in times if one[2])[0] == pytest.approx(5, abs=0.1)


def test_the_ideal_is_the_requests_inside_over_the_target() -> None:
    trace = (Request(100, 4), Request(101, 1))
    assert ideal(trace, target=2) == [(10, 0.5), (11, 1), (12, 0.5), (14, 0)]


def test_the_same_arguments_give_the_same_run() -> None:
    trace = load("poisson:rate=5,over=60", seed=3)
    policy = Policy(target=2, min=0, max=20)
    first, second = (run(trace, Concurrency(policy), service(4, 20)) for _ in range(2))
    assert first == second


def test_a_burst_at_zero_waits_less_than_under_rays_default() -> None:
    trace, of = load("burst:count=40"), service(4, 20, 5)
    ours, theirs = (
        outcome(run(trace, scaler, of))
        for scaler in (
            Concurrency(Policy(target=2, min=0, max=50)),
            RayDefault(target=2, min=0, max=50),
        )
    )
    assert ours.largest == 20
    assert ours.p99_s < theirs.p99_s


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [50, 95, 99, 100]
    assert percentile([3.0], 0.5) == 3
    assert percentile([], 0.5) == 0


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"slots": 0}, "a replica takes 0 requests"),
        ({"start_s": float("nan")}, "a start takes nan s"),
        ({"warm_s": -1}, "a warm start takes -1 s"),
        ({"waiting": -2}, "-2 requests may wait"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused(wrong: dict[str, float], why: str) -> None:
    with pytest.raises(UsageError, match=f"^bad deployment to simulate: {why}"):
        service(**wrong)  # type: ignore[arg-type]


def test_a_trace_in_milliseconds_is_refused() -> None:
    trace = (Request(0, 1), Request(86400_000 * 40, 1))
    with pytest.raises(UsageError, match="a trace of 40000 days; times are in seconds"):
        run(trace, always(1), service())
