"""What a simulation compares with: Ray's own rules run beside those that follow them."""

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weightstream.serve_integration.scaling.policy import Observed
from weightstream.serve_integration.scaling.simulate.reports import Reporting, Reports
from weightstream.serve_integration.scaling.simulate.scalers import RayDefault, Utilisation

with warnings.catch_warnings():  # Ray's own modules use what pydantic deprecates
    warnings.simplefilter("ignore")
    from ray.serve import autoscaling_policy as rays
    from ray.serve._private.autoscaling_metrics_merge import merge_and_aggregate_arrays
    from ray.serve._private.common import DeploymentID
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

steps = st.lists(
    st.tuples(
        st.sampled_from([0.1, 5.0, 30.0, 601.0]),
        st.integers(0, 60) | st.floats(0, 60),
        st.integers(0, 6),
    ),
    min_size=1,
    max_size=40,
)


def rays_decisions(
    config: AutoscalingConfig, seen: list[Observed], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Ask Ray's default policy in Ray's wrapper, bounded as its controller does it."""
    policy = rays._apply_autoscaling_config(rays.default_autoscaling_policy)
    state: dict[str, Any] = {}
    decided = []
    for one in seen:
        ctx = AutoscalingContext(
            deployment_id=DeploymentID("d", "a"),
            deployment_name="d",
            app_name="a",
            current_num_replicas=one.ready,
            target_num_replicas=one.ordered,
            running_replicas=[],
            total_num_requests=one.concurrency,
            total_queued_requests=one.queued,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=config.min_replicas,
            capacity_adjusted_max_replicas=config.max_replicas,
            policy_state=dict(state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=one.now_s,
            config=config,
        )
        with monkeypatch.context() as patched:
            patched.setattr(rays, "time", SimpleNamespace(time=lambda one=one: one.now_s))
            wanted, state = policy(ctx)
        decided.append(max(config.min_replicas, min(config.max_replicas, math.ceil(wanted))))
    return decided


# At 7 replicas Ray rounds 29 / 1 up to 30; at one, next to nothing down to nothing.
@example([(0.1, 1, 0), (0.1, 0, 0), (601.0, 1e-254, 0)], 1, 0)
@example([(0.1, 7, 0), (30.0, 7, 0), (0.1, 29, 0), (30.0, 29, 0)], 1, 1)
@given(steps, st.sampled_from([1, 2, 3, 0.7]), st.integers(0, 2))
def test_rays_default_is_what_ray_decides(
    load: list[tuple[float, float, int]], target: float, least: int
) -> None:
    ours = RayDefault(target, least, 30)
    now_s, ordered, seen, decided = 0.0, least, [], []
    for gap_s, inside, starting in load:
        now_s += gap_s
        ready = max(0, ordered - starting)
        seen.append(Observed(now_s, inside / 2, inside / 2, ready, ordered))
        ordered = ours.decide(seen[-1])
        decided.append(ordered)
    config = AutoscalingConfig(min_replicas=least, max_replicas=30, target_ongoing_requests=target)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (30, 600)
    assert ours.reporting.look_back_s == config.look_back_period_s
    assert ours.reporting.push_s == config.metrics_interval_s
    with pytest.MonkeyPatch.context() as patch:
        assert decided == rays_decisions(config, seen, patch)


@example([(0, 0), (1, 0)], 2, "mean", 1)
@example([(0, 0), (1, 0), (1, 1)], 2, "mean", 1)
@example([(1, 0), (0, 0)], 1, "max", 1)
@example([(1, 0), (1, 0)], 1, "max", 1)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(0, 6),
    st.sampled_from(["mean", "max"]),
    st.integers(1, 60),
)
def test_reports_are_reduced_as_ray_reduces_them(
    gauges: list[tuple[int, int]], starts: int, aggregation: str, later: int
) -> None:
    how = Reporting(push_s=1, look_back_s=60, reduce="ray" if aggregation == "mean" else "max")
    reports = Reports(how)
    times = [100.0 + number for number in range(len(gauges))]
    queued = [float(waiting) for waiting, _ in gauges]
    running = [float(busy) * (number >= starts) for number, (_, busy) in enumerate(gauges)]
    for number, at_s in enumerate(times):
        reports.note(at_s, int(queued[number]), int(running[number]), int(number >= starts))
    now_s = times[-1] + later
    seen = reports.seen(now_s)
    assert seen.queued + seen.running == pytest.approx(
        merge_and_aggregate_arrays(
            np.array(times + times[starts:]),
            np.array(queued + running[starts:]),
            np.array([0, len(times), len(times) + len(times[starts:])]),
            now_s,
            aggregation,
        ),
        abs=1e-6,
    )


def test_a_report_sent_at_once_has_only_what_was_read() -> None:
    reports = Reports(Reporting(push_s=10, look_back_s=30))
    reports.note(0.0, 0, 0, 0)
    reports.send(1.0)  # for a request that came at 1.0
    assert reports.seen(1.0).queued == 0
    reports.note(6.0, 1, 0, 0)
    assert reports.seen(9.0).queued == 0  # read, but not sent
    reports.note(10.0, 1, 0, 0)
    assert reports.seen(12.0).queued == pytest.approx(6 / 12)


def test_a_plain_mean_goes_over_the_whole_window() -> None:
    reports = Reports(Reporting(push_s=1, look_back_s=30, reduce="mean"))
    reports.note(0.0, 0, 0, 1)
    reports.note(6.0, 0, 4, 2)
    assert reports.seen(8.0).running == pytest.approx(4 * 2 / 8)


class TestUtilisation:
    def scaler(self, **more: Any) -> Utilisation:
        return replace(Utilisation(target=0.5, slots=4, min=0, max=50), **more)

    def asked(self, *times: tuple[float, float, int, int], **more: Any) -> list[int]:
        """Decide on (time, running, ready, ordered)."""
        scaler = self.scaler(**more)
        return [scaler.decide(Observed(at, busy, 0, had, n)) for at, busy, had, n in times]

    def test_is_the_share_of_busy_slots_over_its_target(self) -> None:
        assert self.asked((0, 12, 4, 4)) == [6]

    def test_stays_where_it_is_near(self) -> None:
        assert self.asked((0, 8.7, 4, 4)) == [4]

    def test_never_goes_to_zero(self) -> None:
        assert self.asked((0, 0, 1, 1), (400, 0, 1, 1)) == [1, 1]
        assert self.scaler().least == 1

    def test_at_most_doubles_or_adds_four(self) -> None:
        assert self.asked((0, 400, 20, 20), max=500) == [40]
        assert self.asked((0, 400, 2, 2)) == [6]

    def test_decides_every_15_s_only(self) -> None:
        assert self.asked((0, 4, 2, 2), (14.9, 8, 2, 2), (15, 8, 2, 2)) == [2, 2, 4]

    def test_shrinks_to_the_most_of_five_minutes(self) -> None:
        assert self.asked((0, 8, 4, 4), (300, 0, 4, 4), (301, 0, 4, 4), (315, 0, 4, 4))[1:] == [
            4,
            4,
            1,
        ]

    def test_takes_those_that_start_for_no_reason_to_have_fewer(self) -> None:
        assert self.asked((0, 5, 2, 6), down_after_s=0.0) == [6]
