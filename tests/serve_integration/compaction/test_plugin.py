"""What the plug-in does in a real controller, under real traffic."""

import contextlib
from collections.abc import Mapping

import pytest
import ray
from tests.kit.ray_cluster import RayCluster, Traffic, wait_until
from tests.serve_integration.compaction.scene import (
    GO,
    URI,
    Watch,
    at_rest,
    busy,
    controller_log,
    foreign_actor,
    layout,
    state,
)

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import ledger, tuning

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_replicas_move_to_fewer_nodes_and_nobody_notices(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    registry.note("test/hold", True)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch(cluster))
        traffic = [stack.enter_context(Traffic(cluster.url(f"/{name}"), per_s=20)) for name in apps]
        tuning.write(GO)
        wait_until(lambda: registry.recall("test/warmed"), "destinations are warmed")
        assert at_rest(cluster), "nothing moves before its destination is warm"
        registry.note("test/hold", None)
        wait_until(lambda: len(set(layout(cluster).values())) == 2, "two nodes are enough")
        wait_until(lambda: at_rest(cluster), "the old replica is gone")
        wait_until(lambda: state().emptied == 1, "the plug-in counts it")
    assert [one.failures() for one in traffic] == [[], [], []]
    assert watch.fewest == {"a": 1, "b": 1, "c": 1}
    after = layout(cluster)
    (moved,) = [name for name in apps if after[name] != apps[name]]
    assert registry.recall("test/warmed") == [{after[moved]: [URI.format(moved)]}]


def test_a_node_with_somebody_elses_actor_is_left_alone(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    actors = [foreign_actor(apps["a"]), foreign_actor(apps["c"])]
    try:
        tuning.write(GO)
        wait_until(lambda: layout(cluster).get("b") in (apps["a"], apps["c"]), "b has moved")
        wait_until(lambda: at_rest(cluster), "the old replica is gone")
        wait_until(lambda: busy() == {apps["a"], apps["c"]}, "the state says why not more")
        assert layout(cluster) == {**apps, "b": layout(cluster)["b"]}
    finally:
        for actor in actors:
            ray.kill(actor)


def test_replacements_that_never_start_are_given_up_and_nothing_is_lost(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    registry.note("test/fail", True)
    before = state().failures
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch(cluster))
        traffic = [stack.enter_context(Traffic(cluster.url(f"/{name}"), per_s=10)) for name in apps]
        tuning.write(GO)
        wait_until(lambda: state().failures > before, "the plug-in gives up")
        registry.note("test/fail", None)
        wait_until(lambda: at_rest(cluster), "surplus replicas are gone")
    assert layout(cluster) == apps
    assert [one.failures() for one in traffic] == [[], [], []]
    assert watch.fewest == {"a": 1, "b": 1, "c": 1}
    assert "cancelled emptying node" in controller_log()


def test_when_the_plugin_fails_ray_goes_on_alone(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    registry.note("test/broken", True)
    tuning.write(GO)
    ledger.hurry(60)  # no wait after the failure of another test
    with Traffic(cluster.url("/a"), per_s=10) as traffic:
        wait_until(lambda: len(set(layout(cluster).values())) == 2, "Ray compacts by itself")
        wait_until(lambda: at_rest(cluster), "the old replica is gone")
    assert traffic.failures() == []
    assert registry.recall("test/warmed") is None
    assert "failed while choosing a node; Ray's own behaviour holds" in controller_log()
    assert "broken by a test" in controller_log()
