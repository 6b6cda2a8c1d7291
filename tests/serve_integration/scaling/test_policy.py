"""The policy as a function: sizes at once, patience downwards, orders ahead, bounds."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.errors import UsageError
from weightstream.serve_integration.scaling.policy import (
    Decision,
    Observed,
    Policy,
    State,
    decide,
)

SIMPLE = Policy(target=2, min=0, max=100, trend_s=0, confirm_s=0, calm_s=0)


def seen(now_s: float = 0.0, running: float = 0.0, queued: float = 0.0, **more: Any) -> Observed:
    return Observed(now_s, running, queued, **({"ready": 0, "ordered": 0} | more))


def once(policy: Policy, **fields: Any) -> int:
    return decide(seen(**fields), policy, State())[0].replicas


def play(
    policy: Policy, load: Callable[[float], float], seconds: int, start_s: float = 0.0
) -> list[Decision]:
    """Decide once a second with replicas that are ready at once and never a queue."""
    state, decisions, ordered = State(), [], 0
    for now_s in range(seconds):
        now = seen(now_s, load(now_s), ready=ordered, ordered=ordered, start_s=start_s)
        decision, state = decide(now, policy, state)
        ordered = decision.replicas
        decisions.append(decision)
    return decisions


def sizes(decisions: Iterable[Decision]) -> list[int]:
    return [decision.replicas for decision in decisions]


class TestSize:
    def test_is_the_concurrency_over_the_target(self) -> None:
        assert once(SIMPLE, running=7, queued=4) == 6

    def test_from_zero_is_the_same(self) -> None:
        assert once(SIMPLE, queued=40) == 20

    def test_of_what_a_float_measures_is_not_one_too_many(self) -> None:
        assert once(SIMPLE, running=0.1 + 0.2 + 3.7) == 2

    def test_is_whole_steps(self) -> None:
        assert once(replace(SIMPLE, step=4), running=9) == 8

    def test_has_headroom_while_there_is_traffic(self) -> None:
        policy = replace(SIMPLE, step=4, headroom=2)
        assert once(policy, running=9) == 16
        assert once(policy) == 0

    def test_is_cut_at_max_even_in_mid_step(self) -> None:
        assert once(replace(SIMPLE, step=4, max=6), queued=40) == 6

    def test_counts_tokens_where_they_weigh_more(self) -> None:
        policy = replace(SIMPLE, target_tokens=1000)
        assert once(policy, running=2, tokens=5500.0) == 6
        assert once(policy, running=20, tokens=100.0) == 10

    def test_takes_the_queue_for_as_heavy_as_what_runs(self) -> None:
        assert once(replace(SIMPLE, target_tokens=1000), running=2, queued=2, tokens=4000.0) == 8

    def test_without_counted_tokens_is_by_requests(self) -> None:
        assert once(replace(SIMPLE, target_tokens=1000), queued=6) == 3


class TestPatience:
    def test_the_largest_size_of_the_window_holds(self) -> None:
        decided = sizes(play(SIMPLE, lambda now_s: 40 if now_s == 10 else 4, 120))
        assert decided[9:12] == [2, 20, 20]
        assert decided[70:72] == [20, 2]

    def test_one_step_stays_until_idle_is_over(self) -> None:
        policy = replace(SIMPLE, step=2, scale_down_after_s=20, idle_after_s=50)
        decided = sizes(play(policy, lambda now_s: 12 if now_s <= 5 else 0, 100))
        assert [size for size, later in pairwise(decided) if size != later] == [6, 2]
        assert (decided.index(2), decided.index(0)) == (26, 55)

    def test_min_stays_for_ever(self) -> None:
        policy = replace(SIMPLE, min=3)
        assert sizes(play(policy, lambda _: 0.0, 400)) == [3] * 400

    def test_what_was_ordered_before_the_controller_restarted_holds(self) -> None:
        state, now = State(), seen(ready=9, ordered=9, running=2)
        first, state = decide(now, SIMPLE, state)
        held, state = decide(replace(now, now_s=59.0), SIMPLE, state)
        after, _ = decide(replace(now, now_s=61.0), SIMPLE, state)
        assert sizes((first, held, after)) == [9, 9, 1]


class TestConfirmation:
    SURE = replace(SIMPLE, confirm_s=1.0, calm_s=10.0)

    def asked(self, *times: tuple[float, float, float], ready: int = 2) -> list[int]:
        """Decide on (time, running, queued), after ten seconds of little; return the sizes."""
        state, ordered, decided = State(), ready, []
        before = [(now_s, 4.0, 0.0) for now_s in (-20.0, -10.0, -5.0, -0.05)]
        for now_s, running, queued in (*before, *times):
            now = seen(now_s, running, queued, ready=ready, ordered=ordered)
            decision, state = decide(now, self.SURE, state)
            ordered = decision.replicas
            decided.append(ordered)
        return decided[len(before) :]

    def test_of_a_queue_takes_a_moment(self) -> None:
        assert self.asked((0, 8, 32), (0.9, 8, 32), (1.2, 8, 32)) == [2, 2, 20]

    def test_of_what_the_replicas_still_take_takes_longer(self) -> None:
        assert self.asked((0, 8, 1), (5, 8, 1), (9.9, 8, 1), (10.1, 8, 1)) == [2, 2, 2, 5]

    def test_fails_where_it_was_a_single_sample(self) -> None:
        assert self.asked((0, 8, 32), (0.9, 4, 0), (1.2, 4, 0)) == [2, 2, 2]

    def test_is_of_the_least_that_was_wanted_meanwhile(self) -> None:
        assert self.asked((0, 8, 12), (0.9, 8, 32), (1.0, 8, 32)) == [2, 2, 10]

    def test_is_not_asked_while_nothing_is_ready(self) -> None:
        assert self.asked((0, 0, 2), (0.1, 0, 8), (0.2, 0, 40), ready=0)[-1] == 20


class TestGrowth:
    CAPPED = replace(SIMPLE, growth=2.0, step=2)

    def test_is_held_to_a_factor_of_what_is_ready(self) -> None:
        assert once(self.CAPPED, running=100, ready=10, ordered=10) == 20

    def test_may_always_be_one_step(self) -> None:
        assert once(self.CAPPED, running=100, ready=1, ordered=1) == 3

    def test_is_not_held_from_zero(self) -> None:
        assert once(self.CAPPED, queued=40) == 20

    def test_never_takes_back_an_order(self) -> None:
        assert once(self.CAPPED, running=100, ready=5, ordered=40) == 40

    def test_forgets_what_a_spike_would_have_had(self) -> None:
        spike, state = decide(seen(running=100, ready=2, ordered=2), self.CAPPED, State())
        later, _ = decide(seen(1, running=4, ready=4, ordered=4), self.CAPPED, state)
        assert sizes((spike, later)) == [4, 4]


class TestTrend:
    AHEAD = replace(SIMPLE, trend_s=30.0)

    def test_orders_what_a_rise_will_have_come_to(self) -> None:
        last = play(self.AHEAD, lambda now_s: 20 + now_s, 60, start_s=20.0)[-1]
        assert last.need == math.ceil(79 / 2)
        assert last.ahead == pytest.approx(99 / 2, abs=2)

    def test_needs_a_measured_start(self) -> None:
        last = play(self.AHEAD, lambda now_s: 20 + now_s, 60)[-1]
        assert last.ahead == last.need

    @pytest.mark.parametrize("at_s", range(30, 61, 3))
    def test_is_no_step(self, at_s: int) -> None:
        decided = play(self.AHEAD, lambda now_s: 40 if now_s >= at_s else 4, 100, start_s=60.0)
        assert max(sizes(decided)) == 20

    @pytest.mark.parametrize("at_s", range(30, 61, 3))
    def test_is_no_spike(self, at_s: int) -> None:
        decided = play(self.AHEAD, lambda now_s: 40 if now_s == at_s else 4, 100, start_s=60.0)
        assert max(sizes(decided)) == 20

    def test_is_no_queue_that_builds_up_while_replicas_start(self) -> None:
        state = State()
        for now_s in range(60):
            waiting = seen(now_s, queued=5 * now_s, ordered=100, start_s=60.0)
            decision, state = decide(waiting, self.AHEAD, state)
            assert decision.ahead == decision.need

    def test_at_most_doubles(self) -> None:
        last = play(self.AHEAD, lambda now_s: 10 * now_s, 60, start_s=600.0)[-1]
        assert last.ahead == 2 * last.need


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"target": 0}, "target is 0"),
        ({"target": math.nan}, "target is nan"),
        ({"min": -1}, "min is -1"),
        ({"min": 9, "max": 8}, "min 9 is above max 8"),
        ({"max": 0}, "max is 0"),
        ({"step": 0}, "step is 0"),
        ({"step": 200}, "step 200 is above max 100"),
        ({"headroom": -1}, "headroom is -1"),
        ({"headroom": 50, "step": 2}, "leaves none of max 100"),
        ({"scale_down_after_s": -1.0}, "scale_down_after_s is -1.0"),
        ({"idle_after_s": math.inf}, "idle_after_s is inf"),
        ({"growth": 1.0}, "growth is 1.0"),
        ({"target_tokens": 0.0}, "target_tokens is 0.0"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=f"^bad scaling policy: .*{why}"):
        replace(SIMPLE, **wrong)


policies = st.builds(
    lambda low, more, step, headroom, **wishes: Policy(
        min=low,
        max=low + more + (headroom + 1) * step,
        step=step,
        headroom=headroom,
        **wishes,
    ),
    low=st.integers(0, 5),
    more=st.integers(0, 50),
    step=st.integers(1, 5),
    headroom=st.integers(0, 3),
    target=st.floats(0.1, 50),
    scale_down_after_s=st.floats(0, 100),
    idle_after_s=st.floats(0, 200),
    growth=st.none() | st.floats(1.1, 4),
    confirm_s=st.sampled_from([0.0, 1.0, 10.0]),
    calm_s=st.sampled_from([0.0, 1.0, 20.0]),
    trend_s=st.sampled_from([0.0, 10.0, 30.0]),
)
loads = st.lists(
    st.tuples(st.floats(0.1, 20), st.floats(0, 500), st.floats(0, 500)), min_size=1, max_size=60
)


def replay(
    policy: Policy, load: list[tuple[float, float, float]]
) -> list[tuple[Observed, Decision]]:
    """Decide on gaps, running and queued; what was ordered is ready at the next decision."""
    state, now_s, ordered, decided = State(), 0.0, policy.min, []
    for gap_s, running, queued in load:
        now_s += gap_s
        now = seen(now_s, running, queued, ready=ordered, ordered=ordered, start_s=20.0)
        decision, state = decide(now, policy, state)
        ordered = decision.replicas
        decided.append((now, decision))
    return decided


@given(policies, loads)
def test_bounds_hold(policy: Policy, load: list[tuple[float, float, float]]) -> None:
    assert all(policy.min <= one.replicas <= policy.max for _, one in replay(policy, load))


@given(policies, loads)
def test_zero_comes_only_after_idle(policy: Policy, load: list[tuple[float, float, float]]) -> None:
    busy_s = -math.inf
    for now, decision in replay(policy, load):
        busy_s = now.now_s if now.concurrency > 0 else busy_s
        if decision.replicas == 0:
            assert now.now_s - busy_s >= policy.idle_after_s


@given(policies, loads)
def test_shrinks_only_to_what_was_enough_all_through_the_window(
    policy: Policy, load: list[tuple[float, float, float]]
) -> None:
    decided = replay(policy, load)
    for (_, before), (now, after) in pairwise(decided):
        if after.replicas < before.replicas:
            recent = [
                one.wanted
                for then, one in decided
                if then.now_s <= now.now_s and now.now_s - then.now_s <= policy.scale_down_after_s
            ]
            assert after.replicas >= max(recent)


@given(policies, loads, st.floats(0, 100), st.floats(0, 100))
def test_more_requests_never_mean_fewer_replicas(
    policy: Policy, load: list[tuple[float, float, float]], running: float, queued: float
) -> None:
    state, last = State(), replay(policy, load)[-1][0]
    for now, _ in replay(policy, load)[:-1]:
        state = decide(now, policy, state)[1]
    more = replace(last, running=last.running + running, queued=last.queued + queued)
    assert decide(more, policy, state)[0].replicas >= decide(last, policy, state)[0].replicas


@given(policies, st.floats(0, 500), st.floats(0, 500), st.integers(2, 100))
def test_constant_load_never_flaps(
    policy: Policy, running: float, queued: float, times: int
) -> None:
    policy = replace(policy, growth=None)
    decided = sizes(one for _, one in replay(policy, [(1.0, running, queued)] * times))
    assert len(set(decided)) == 1 or running + queued == 0


@given(policies, st.floats(0.1, 1000))
def test_from_zero_one_decision_is_enough(policy: Policy, queued: float) -> None:
    steps = math.ceil(math.ceil(queued / policy.target - 1e-9) / policy.step)
    ideal = (steps + policy.headroom) * policy.step
    assert once(policy, queued=queued) == min(max(ideal, policy.min), policy.max)
