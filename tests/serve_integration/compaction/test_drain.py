"""The command, where the controller does not compact: nodes are drained, and are gone."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import serve
from tests.kit.ray_cluster import NodeSpec, RayCluster, Traffic, wait_until
from tests.serve_integration.compaction.command import compact, dry_run, watching
from tests.serve_integration.compaction.scene import (
    HOOK,
    ROOT,
    App,
    controller_log,
    controller_pid,
    layout,
)

from weightstream.serve_integration.compaction import ledger

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    """One worker, and a controller in which the plug-in finds that Ray lacks something."""
    env = {
        "PYTHONPATH": str(ROOT),
        "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": f"{HOOK}_where_ray_lacks_something",
        "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1",
        "RAY_SERVE_NODE_COMPACTION_DELAY_S": "1000",
    }
    with RayCluster([NodeSpec()], env=env) as running:
        running.start_serve()
        yield running


def deploy(name: str, **options: Any) -> None:
    """Run an app of one CPU."""
    made = serve.deployment(App).options(graceful_shutdown_wait_loop_s=0.2, **options)
    serve.run(made.bind(name), name=name, route_prefix=f"/{name}")


def spread(cluster: RayCluster) -> None:
    """Run four apps on three nodes; two of the nodes would do.

    `p` has a group and fits on two nodes, `c` stays where it is, `a` and `b` may be anywhere.
    """
    deploy("a", ray_actor_options={"num_cpus": 1})
    cluster.add_node(NodeSpec(resources={"spot": 1}))
    group = [{"CPU": 0.5, "spot": 0.1}, {"CPU": 0.5}]
    options = {"placement_group_bundles": group, "placement_group_strategy": "PACK"}
    deploy("p", ray_actor_options={"num_cpus": 0.5}, **options)
    cluster.add_node(NodeSpec(resources={"spot": 1, "late": 1}))
    deploy("c", ray_actor_options={"num_cpus": 1, "resources": {"late": 0.1}})
    deploy("b", ray_actor_options={"num_cpus": 1})
    assert len(set(layout(cluster).values())) == 3


def workers_alive() -> int:
    return len([node for node in ray.nodes() if node["Alive"]]) - 1


def states(cluster: RayCluster) -> set[str]:
    return {one.state for one in cluster.replicas()}


def test_nodes_are_drained_and_nobody_notices(cluster: RayCluster) -> None:
    spread(cluster)
    assert "has no _find_a_node_by_another_name any more" in controller_log()
    assert controller_log().count("compaction is not installed") == 1

    report = dry_run(cluster)
    assert report["why_drain"] == "the plug-in does not run in Serve's controller"
    assert (report["nodes_now"], report["nodes_then"]) == (3, 2)

    with contextlib.ExitStack() as stack:
        asked = [stack.enter_context(Traffic(cluster.url(f"/{name}"), 10)) for name in "abcp"]
        done = compact(cluster, "--now")
        assert done.returncode == 0, done.stderr
        assert "nodes emptied: 1; no node can be emptied" in done.stdout
        assert workers_alive() == 2
    assert [one.failures() for one in asked] == [[], [], [], []]

    by_node = {node_id: name for name, node_id in sorted(layout(cluster).items())}
    for name in set("abcp").difference(by_node.values()):
        serve.delete(name)
    compact(cluster, "--tune", "stable_s=1", "--tune", "look_back_s=0")
    with contextlib.ExitStack() as stack:
        left = [Traffic(cluster.url(f"/{name}"), 10) for name in by_node.values()]
        asked = [stack.enter_context(one) for one in left]
        said = stack.enter_context(watching(cluster))
        wait_until(ledger.lease_holder, "it has the lease")
        second = compact(cluster, "--now")
        assert second.returncode == 8
        assert "compacts this cluster already" in second.stderr
        wait_until(lambda: "PENDING_MIGRATION" in states(cluster), "a replica moves")
        os.kill(controller_pid(), signal.SIGKILL)
        wait_until(lambda: workers_alive() == 1, "the node is gone", 120)
    assert any("moving" in line for line in said)
    assert [one.failures() for one in asked] == [[], []]
    assert sorted(layout(cluster)) == sorted(by_node.values())
