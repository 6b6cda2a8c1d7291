"""What goes wrong while the plug-in empties a node costs no request and no replica."""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping

import pytest
import ray
from tests.kit.ray_cluster import NodeSpec, RayCluster, Replica, Traffic, wait_until
from tests.serve_integration.compaction.scene import (
    GO,
    URI,
    Watch,
    at_rest,
    controller_log,
    controller_pid,
    layout,
    serves,
    state,
)

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import ledger, tuning
from weightstream.serve_integration.compaction.ledger import leased

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def traffic(cluster: RayCluster, apps: Mapping[str, str]) -> Iterator[dict[str, Traffic]]:
    """Ask every app, all the time."""
    with contextlib.ExitStack() as stack:
        asked = {name: Traffic(cluster.url(f"/{name}"), per_s=20) for name in apps}
        for one in asked.values():
            stack.enter_context(one)
        yield asked


def moving(cluster: RayCluster) -> list[Replica]:
    """Return the old and the new replica of the app that moves, once both are there."""
    old = [one.app for one in cluster.replicas() if one.state == "PENDING_MIGRATION"]
    found = [one for one in cluster.replicas() if one.app in old]
    return found if len(found) == 2 and all(one.node_id for one in found) else []


def go_until_it_moves(cluster: RayCluster) -> tuple[Replica, Replica]:
    """Compact with replicas that start slowly; return old and new in mid-move."""
    registry.note("test/start_s", 5)
    tuning.write(GO)
    wait_until(lambda: moving(cluster), "a replica moves")
    old, new = sorted(moving(cluster), key=lambda one: one.state == "STARTING")
    assert (old.state, new.state) == ("PENDING_MIGRATION", "STARTING")
    return old, new


def failures(traffic: Mapping[str, Traffic]) -> dict[str, list[object]]:
    for one in traffic.values():
        one.stop()
    return {name: list(one.failures()) for name, one in traffic.items()}


def test_a_controller_that_dies_in_mid_move_goes_on_where_it_was(
    cluster: RayCluster, apps: Mapping[str, str], traffic: Mapping[str, Traffic]
) -> None:
    go_until_it_moves(cluster)
    os.kill(controller_pid(), signal.SIGKILL)
    wait_until(lambda: answers(cluster), "another controller runs")
    registry.note("test/start_s", None)
    wait_until(lambda: len(set(layout(cluster).values())) == 2, "two nodes are enough", 120)
    wait_until(lambda: at_rest(cluster), "nothing is left over")
    assert failures(traffic) == {"a": [], "b": [], "c": []}


def answers(cluster: RayCluster) -> bool:
    with contextlib.suppress(ray.exceptions.RayActorError):
        return bool(cluster.replicas())
    return False


def test_agents_that_are_dead_do_not_keep_replicas_from_moving(
    cluster: RayCluster, apps: Mapping[str, str], traffic: Mapping[str, Traffic]
) -> None:
    registry.note("test/agents", True)
    for node in cluster.workers:
        registry.note_agent(registry.Agent(node.id, "/nowhere", "127.0.0.1:1", "secret", 0))
    try:
        with Watch(cluster) as watch:
            tuning.write(GO)
            wait_until(lambda: len(set(layout(cluster).values())) == 2, "two nodes are enough")
            wait_until(lambda: at_rest(cluster), "the old replica is gone")
    finally:
        for node in cluster.workers:
            registry.forget_agent(node.id)
    assert failures(traffic) == {"a": [], "b": [], "c": []}
    assert watch.fewest == {"a": 1, "b": 1, "c": 1}
    assert "goes on without all destinations warm" in controller_log()
    warmed = registry.recall("test/warmed")
    assert isinstance(warmed, list)
    assert [list(one.values()) for one in warmed] in [[[[URI.format(name)]]] for name in apps]


def test_while_somebody_drains_nodes_nothing_is_begun(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    with leased("somebody else"):
        wait_until(lambda: state().text == "somebody else drains nodes", "it sees the lease")
        tuning.write(GO)
        ledger.hurry(60)
        before = state().at
        wait_until(lambda: state().at > before + 2, "it thinks on for two seconds")
        assert state().phase == "blocked"
        assert layout(cluster) == apps
    wait_until(lambda: len(set(layout(cluster).values())) == 2, "it may go on")
    wait_until(lambda: at_rest(cluster), "the old replica is gone")


def test_a_destination_that_dies_costs_the_old_replica_nothing(
    cluster: RayCluster, apps: Mapping[str, str], traffic: Mapping[str, Traffic]
) -> None:
    old, new = go_until_it_moves(cluster)
    (lost,) = [one for one in cluster.workers if one.id == new.node_id]
    (alone,) = [name for name, node_id in apps.items() if node_id == lost.id]
    with Traffic(cluster.url(f"/{old.app}"), per_s=50) as asked:
        cluster.kill_node(lost)
        registry.note("test/start_s", None)
        wait_until(lambda: at_rest(cluster), "all three run, on the two nodes that are left")
    assert asked.failures() == []
    found = failures(traffic)
    assert [name for name, failed in found.items() if failed] in ([], [alone])
    assert {one.node_id for one in cluster.replicas() if serves(one)} <= {
        node.id for node in cluster.workers
    }
    cluster.add_node(NodeSpec())  # for whoever comes next
