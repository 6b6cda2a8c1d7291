"""Several processes, one store: each byte crosses the wire once, and then never again."""

import time

import pytest
from tests.conftest import LogWatch
from tests.e2e.conftest import Scene, check_message
from tests.kit import faults as f
from tests.kit import jobs, models
from tests.kit.forked import ChildFailed, Forked

from weightstream.errors import UnavailableError

MIB = 1 << 20


def expected(scene: Scene) -> str:
    return jobs.digest(models.tensors(scene.files))


def unreachable(scene: Scene) -> None:
    """Nobody can reach the origin any more."""
    scene.proxy.add(f.ALWAYS, f.Drop(reset=True))


@pytest.mark.parametrize("processes", [2, 4])
def test_a_cold_model_loaded_by_several_at_once_crosses_the_wire_once(
    scene: Scene, processes: int
) -> None:
    scene.put(models.sharded(3, 48 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(40 * MIB))
    started = [Forked(jobs.load, scene.uri, env=scene.env) for _ in range(processes)]
    outcomes = []
    for one in started:
        with one:
            outcomes.append(one.result())
    assert {outcome.digest for outcome in outcomes} == {expected(scene)}
    assert scene.proxy.body_bytes(".safetensors") <= 1.05 * scene.size


def test_the_next_process_asks_the_origin_nothing(scene: Scene) -> None:
    with Forked(jobs.load, scene.uri, env=scene.env) as cold:
        assert cold.result().bytes_by_source["origin"] == scene.size
    scene.proxy.clear()
    with Forked(jobs.load, scene.uri, env=scene.env) as warm:
        outcome = warm.result()
    assert outcome.digest == expected(scene)
    assert set(outcome.bytes_by_source) == {"mapped"}
    assert scene.proxy.exchanges() == []


def test_after_the_time_to_live_only_the_listing_is_asked(scene: Scene) -> None:
    assert scene.loads_right()
    scene.drain()
    scene.use(listing_ttl_s=0)
    scene.proxy.clear()
    assert scene.loads_right()
    assert scene.proxy.body_bytes(".safetensors") == 0
    assert len(scene.proxy.exchanges()) in (1, 2)


def test_a_new_version_is_noticed_after_the_time_to_live(scene: Scene) -> None:
    assert scene.loads_right()
    scene.drain()
    scene.put(models.sharded(3, 6 * MIB, seed="another"))
    scene.use(listing_ttl_s=0)
    assert scene.loads_right()


def test_offline_uses_the_stored_version_and_says_so_once(
    scene: Scene, expect_log: LogWatch
) -> None:
    assert scene.loads_right()
    scene.drain()
    scene.use(listing_ttl_s=0, deadline_s=2.0)
    unreachable(scene)
    expect_log("using the stored version of " + scene.uri)
    assert scene.loads_right()
    assert scene.loads_right()
    assert len(expect_log.messages("using the stored version")) == 1


def test_fresh_refuses_the_stored_version(scene: Scene) -> None:
    assert scene.loads_right()
    scene.drain()
    scene.use(fresh=True, deadline_s=2.0)
    unreachable(scene)
    with pytest.raises(UnavailableError) as caught:
        scene.load()
    check_message(caught.value, scene.uri)


def test_offline_without_a_stored_version_is_an_error(scene: Scene) -> None:
    scene.use(deadline_s=2.0)
    unreachable(scene)
    with pytest.raises(UnavailableError):
        scene.load()


def test_a_process_that_dies_with_chunks_locked_holds_nobody_up(scene: Scene) -> None:
    """The one that fetches is killed; the one that waits for its chunks goes on at once."""
    scene.use(share_wait_s=30.0)
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=4), f.Stall(60, 1000))
    with Forked(jobs.load, scene.uri, env=scene.env) as first:
        first.wait_for(lambda: len(scene.proxy.exchanges(f.When(key=".safetensors"))) >= 4)
        with Forked(jobs.load, scene.uri, env=scene.env) as second:
            time.sleep(0.3)
            killed_s = time.monotonic()
            first.kill()
            assert second.result().digest == expected(scene)
            assert time.monotonic() - killed_s < 6


def test_a_process_that_hangs_with_chunks_locked_is_waited_for_so_long_only(scene: Scene) -> None:
    scene.use(share_wait_s=1.0, stall_timeout_s=30.0, deadline_s=30.0, hedge="off")
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=4), f.Stall(60, 1000))
    with Forked(jobs.load, scene.uri, env=scene.env) as first:
        first.wait_for(lambda: len(scene.proxy.exchanges(f.When(key=".safetensors"))) >= 4)
        started = time.monotonic()
        with Forked(jobs.load, scene.uri, env=scene.env) as second:
            assert second.result().digest == expected(scene)
        assert time.monotonic() - started < 15


def test_an_error_in_one_process_is_its_own(scene: Scene) -> None:
    """One that is refused does not spoil what another can fetch."""
    env = scene.env | {"AWS_SECRET_ACCESS_KEY": "x" * 20}
    with Forked(jobs.load, scene.uri, env=env) as refused:  # noqa: SIM117
        with pytest.raises(ChildFailed, match="AccessDeniedError"):
            refused.result()
    assert scene.loads_right()
