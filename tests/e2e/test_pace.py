"""Stragglers, throttling, Retry-After: what the engine does about an origin's pace."""

import time

from tests.e2e.conftest import Scene
from tests.kit import faults as f
from tests.kit import models
from tests.kit.link import Exchange

MIB = 1 << 20
WEIGHTS = f.When(key="-of-", method="GET", ranged=True)


def ranges(scene: Scene) -> list[Exchange]:
    return [e for e in scene.proxy.exchanges(WEIGHTS) if e.range is not None]


def test_one_straggling_range_does_not_hold_the_load(scene: Scene) -> None:
    """One connection drips at 20 KiB/s, which is no stall: a second request overtakes it."""
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key="-of-", ranged=True, nth=9), f.Drip(20 << 10))
    started = time.monotonic()
    assert scene.loads_right()
    assert time.monotonic() - started < 12  # alone, the range would take 51 s
    assert scene.proxy.body_bytes("-of-") <= 1.15 * scene.size


def test_a_silent_range_is_hedged_before_its_stall_timeout(scene: Scene) -> None:
    scene.use(stall_timeout_s=30.0, deadline_s=60.0)
    scene.proxy.add(f.When(key="-of-", ranged=True, nth=4), f.Stall(60, 1000))
    started = time.monotonic()
    assert scene.loads_right()
    assert time.monotonic() - started < 8


def test_without_hedging_nothing_is_asked_twice(scene: Scene) -> None:
    scene.use(hedge="off")
    scene.proxy.add(f.When(key="-of-", ranged=True, nth=4), f.Drip(400 << 10))
    assert scene.loads_right()
    assert scene.proxy.body_bytes("-of-") == scene.size


def test_retry_after_is_honoured(scene: Scene) -> None:
    """No request of any range for as long as the origin asked for."""
    scene.use(concurrency=4)
    when = f.When(key="-of-", ranged=True, nth=3)
    scene.proxy.add(when, f.Status(503, "SlowDown", retry_after_s=2))
    assert scene.loads_right()
    seen = ranges(scene)
    refused = next(e for e in seen if e.status == 503)
    later = [e for e in seen if e.started_s > refused.ended_s + 0.1]
    assert later
    assert min(e.started_s for e in later) - refused.ended_s > 1.8
    same = [e for e in seen if (e.path, e.range) == (refused.path, refused.range)]
    assert same[1].started_s - refused.ended_s > 1.8


def test_slow_down_halves_the_requests_in_flight(scene: Scene) -> None:
    scene.put(models.sharded(3, 96 * MIB, seed=scene.prefix))
    scene.use(max_concurrency=16, hedge="off", deadline_s=30.0)
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.Latency(0.1))
    scene.proxy.add(f.When(key="-of-", ranged=True, nth=50, times=4), f.SLOW_DOWN)
    assert scene.loads_right()
    seen = ranges(scene)
    refused_s = max(e.ended_s for e in seen if e.status == 503)
    before = max(e.in_flight for e in seen if e.started_s < refused_s)
    # Those in flight at that moment end first; then it holds for some seconds.
    after = [e.in_flight for e in seen if refused_s + 0.5 < e.started_s < refused_s + 3]
    assert len(after) > 5
    assert max(after) <= before // 2


def test_more_requests_are_in_flight_while_that_helps(scene: Scene) -> None:
    """Each connection carries 10 MiB/s after 50 ms, so a range of 8 MiB outlasts every window, and
    sixteen of them are no load for the proxy: with 20 MiB/s a slow machine was what limited."""
    scene.put(models.sharded(3, 288 * MIB, seed=scene.prefix))
    scene.use(write_back="off", chunk_size=8 * MIB, range_size=8 * MIB)
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.Latency(0.05), f.Drip(10 * MIB))
    scene.load()
    assert max(e.in_flight for e in ranges(scene)) >= 16


def test_a_fixed_concurrency_is_kept_to(scene: Scene) -> None:
    scene.use(concurrency=3, hedge="off")
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.Latency(0.05))
    assert scene.loads_right()
    found = ranges(scene)
    # The proxy notes an end a moment after the client has the last byte, and may go on already.
    # Each request takes 50 ms at least, so a fourth one would overlap by far more than 10.
    at_once = (
        sum(o.started_s <= e.started_s < o.ended_s - 0.01 for o in found if o is not e)
        for e in found
    )
    assert max(at_once) + 1 == 3
