"""The fleet as it is made from what Ray and Serve say: who is busy, what is free, what costs."""

from typing import Any

import pytest

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction.facts import (
    Bundle,
    ClusterFacts,
    NodeFacts,
    foreign_actors,
)
from weightstream.serve_integration.compaction.fleet import Node, Workload
from weightstream.serve_integration.compaction.observe import (
    COST_LABEL,
    Placed,
    View,
    cost_of,
    fleet_of,
)
from weightstream.serve_integration.compaction.serving import Needs, served_of, workload_of

A = Workload("a/App", ({"CPU": 1},))
PAIR = Workload("pair/App", ({"CPU": 1}, {"CPU": 1}), "PACK")


def facts(*nodes: NodeFacts, **more: Any) -> ClusterFacts:
    return ClusterFacts(nodes, **more)


def worker(name: str, free: float, **more: float) -> NodeFacts:
    total = {"CPU": 4.0, f"node:{name}": 1.0, "object_store_memory": 1e8} | more
    left = {"CPU": free, f"node:{name}": 0.99, "object_store_memory": 5e7}
    return NodeFacts(name, total, left, {}, head=False, draining=False)


def only(found: ClusterFacts, *placed: Placed) -> Node:
    (node,) = fleet_of(found, placed, View()).nodes
    return node


def test_a_node_with_nothing_but_replicas_is_not_busy() -> None:
    node = only(facts(worker("n", 2)), Placed("1", A, "n"), Placed("2", A, "n"))
    assert (node.busy, len(node.replicas)) == ("", 2)


def test_what_somebody_else_uses_makes_a_node_busy() -> None:
    node = only(facts(worker("n", 1.5)), Placed("1", A, "n"))
    assert node.busy == "1.5 CPU in use by something that is not of Serve"
    custom = only(facts(worker("n", 3, licence=1)), Placed("1", A, "n"))
    assert custom.busy == "1 licence in use by something that is not of Serve"


def test_a_group_is_counted_where_its_bundles_lie() -> None:
    """What Ray adds to a node's resources for a group is nobody's."""
    groups = {"actor": (Bundle("n", {"CPU": 1}), Bundle("m", {"CPU": 1}))}
    here = worker("n", 3, CPU_group_0_ab=1, bundle_group_0_ab=1000)
    found = facts(here, worker("m", 3), groups=groups)
    n, m = fleet_of(found, [Placed("1", PAIR, "n", "actor")], View()).nodes
    assert n.busy == ""
    assert m.busy == "has a bundle of pair/App, which lives on another node"


def test_sums_of_fractions_are_nobodys() -> None:
    third = Workload("third", ({"CPU": 1 / 3},))
    node = only(facts(worker("n", 4 - 0.9999)), *(Placed(str(i), third, "n") for i in range(3)))
    assert node.busy == ""


def actor(name: str, port: int, owner: int = 0, node: str = "n", detached: bool = False) -> Any:
    return {
        "Name": name,
        "ActorClassName": "Class",
        "IsDetached": detached,
        "Address": {"NodeID": node, "IPAddress": "10.0.0.1", "Port": port},
        "OwnerAddress": {"NodeID": "h", "IPAddress": "10.0.0.1", "Port": owner},
    }


def test_actors_that_replicas_start_for_themselves_are_not_foreign() -> None:
    replica = actor("SERVE_REPLICA::a#App#x", 1)
    engine, worker_of_engine = actor("", 2, owner=1), actor("", 3, owner=2)
    assert foreign_actors([worker_of_engine, engine, replica]) == {}
    assert foreign_actors([replica, actor("trainer", 4, owner=9)]) == {"n": "trainer"}
    assert foreign_actors([replica, actor("kept", 5, owner=1, detached=True)]) == {"n": "kept"}


def test_a_label_says_what_a_node_costs_else_its_resources_do() -> None:
    prices = {"GPU": 20.0, "CPU": 1.0}
    assert cost_of({"GPU": 2, "CPU": 8}, {}, prices) == 48
    assert cost_of({"GPU": 2, "CPU": 8}, {COST_LABEL: "3.5"}, prices) == 3.5
    assert cost_of({"CPU": 8}, {COST_LABEL: "cheap"}, prices) == 8
    assert cost_of({"memory": 1e9}, {}, prices) == 1


def details(status: str = "HEALTHY", target: int = 1, **config: Any) -> Any:
    replica = {"replica_id": "x", "state": "RUNNING", "node_id": "n", "actor_name": "SERVE_x"}
    app = {
        "deployment_config": {"ray_actor_options": {}} | config,
        "required_resources": {"CPU": 1, "GPU": 0},
        "target_num_replicas": target,
        "status": status,
        "replicas": [replica],
    }
    return {"applications": {"a": {"deployments": {"App": app}}}}


def no_weights(_: registry.Deployment) -> tuple[registry.Weights, ...]:
    return ()


def test_serves_details_become_workloads() -> None:
    served = served_of(details(), no_weights)
    assert served.unrest == ""
    (one,) = served.placed
    assert (one.id, one.node_id, one.workload) == ("x", "n", served.workloads["a/App"])
    assert one.workload == Workload("a/App", ({"CPU": 1},))


def test_a_deployment_that_starts_or_ails_is_unrest() -> None:
    growing = served_of(details(target=2), no_weights)
    assert growing.unrest == "a/App: 1 of 1 replicas run, 2 wanted"
    assert served_of(details("UNHEALTHY"), no_weights).unrest == "a/App is UNHEALTHY"


def test_a_group_without_a_strategy_is_rays_default() -> None:
    bundles = [{"CPU": 1}, {"CPU": 1}]
    served = served_of(details(placement_group_bundles=bundles), no_weights)
    assert served.workloads["a/App"].strategy == "PACK"


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (Needs({}, is_gang=True), "its replicas are a gang, which moves as one"),
        (Needs({}, is_pinned=True), "its replicas follow the proxies"),
        (
            Needs({}, [{"CPU": 1}] * 2, bundle_selectors=[{"zone": "a"}, {"zone": "b"}]),
            "its bundles ask for different labels",
        ),
    ],
)
def test_replicas_that_cannot_be_moved_say_why(needs: Needs, reason: str) -> None:
    assert workload_of("a/App", needs, ()).fixed == reason
