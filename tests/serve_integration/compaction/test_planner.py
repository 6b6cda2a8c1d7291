"""The choice of a node: rules one by one, and that no plan of thousands does not fit."""

import itertools
import random
from collections.abc import Iterable

import pytest

from weightstream.serve_integration.compaction.fleet import (
    Fleet,
    Model,
    Node,
    Replica,
    Reserve,
    Resources,
    Workload,
    applied,
    fits_labels,
    matches,
    need_of,
)
from weightstream.serve_integration.compaction.planner import (
    Limits,
    Verdict,
    choose,
    explain,
    outlook,
)

LIMITS = Limits()
GIB = 1 << 30


def workload(name: str, cpus: float = 1, gpus: float = 0, **more: object) -> Workload:
    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return Workload(name, (bundle,), **more)  # type: ignore[arg-type]


def node(name: str, total: Resources, workloads: Iterable[Workload] = (), **more: object) -> Node:
    replicas = tuple(Replica(f"{name}.{i}", one) for i, one in enumerate(workloads))
    free = dict(total)
    for replica in replicas:
        for kind, amount in need_of(replica.workload).items():
            free[kind] = free.get(kind, 0) - amount
    return Node(name, total, free, replicas, **more)  # type: ignore[arg-type]


def two(small: Node, large: Node) -> Fleet:
    return Fleet((node("head", {"CPU": 0}, head=True), small, large))


def verdict(fleet: Fleet, node_id: str, limits: Limits = LIMITS) -> Verdict:
    (found,) = [one for one in explain(fleet, limits) if one.node_id == node_id]
    return found


CPU4 = {"CPU": 4}
A, B = workload("a"), workload("b")


def test_the_node_with_the_fewest_replicas_is_emptied() -> None:
    fleet = two(node("x", CPU4, [A]), node("y", CPU4, [A, B]))
    plan = choose(fleet, LIMITS).plan
    assert plan is not None
    assert (plan.node_id, plan.moves) == ("x", {"x.0": ("y",)})


def test_a_node_that_costs_more_may_have_more_replicas() -> None:
    fleet = two(node("x", CPU4, [A]), node("y", CPU4, [A, B], cost=3.0))
    plan = choose(fleet, LIMITS).plan
    assert plan is not None
    assert (plan.node_id, plan.saves) == ("y", 3.0)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"head": True}, "head"),
        ({"draining": True}, "draining"),
        ({"busy": "an actor of somebody"}, "busy"),
    ],
)
def test_nodes_that_are_never_emptied(changes: dict[str, object], outcome: str) -> None:
    fleet = two(node("x", CPU4, [A], **changes), node("y", CPU4, [A, B, B, B]))
    assert verdict(fleet, "x").outcome == outcome
    plan = choose(fleet, LIMITS).plan
    assert plan is None or plan.node_id != "x"


def test_a_node_without_replicas_is_neither_emptied_nor_filled() -> None:
    fleet = Fleet((node("x", CPU4, [A]), node("y", CPU4, [A] * 4), node("z", CPU4)))
    assert choose(fleet, LIMITS).plan is None
    assert verdict(fleet, "z").outcome == "unused"
    assert verdict(fleet, "x").reason == "a does not fit on any other node in use"


def test_a_draining_node_takes_nothing() -> None:
    fleet = Fleet(
        (node("x", CPU4, [A]), node("y", CPU4, [A], draining=True), node("z", CPU4, [A] * 4))
    )
    assert choose(fleet, LIMITS).plan is None


def test_thirds_of_a_gpu_are_one() -> None:
    third = workload("third", cpus=0, gpus=1 / 3)
    more = workload("more", cpus=0, gpus=0.33335)
    gpu = {"GPU": 1, "CPU": 1}
    assert verdict(two(node("x", gpu, [third]), node("y", gpu, [third] * 2)), "x").plan
    assert not verdict(two(node("x", gpu, [more]), node("y", gpu, [third] * 2)), "x").plan


def test_replicas_without_gpus_go_where_no_gpus_are() -> None:
    gpus = node("y", {"CPU": 4, "GPU": 2}, [workload("gpu", gpus=1), A, A])
    plan = verdict(Fleet((node("x", CPU4, [A]), gpus, node("z", CPU4, [A, B]))), "x").plan
    assert plan is not None
    assert plan.moves == {"x.0": ("z",)}


def test_labels_decide_where_a_replica_fits() -> None:
    east = workload("east", selectors=({"zone": "east"},))
    fleet = two(node("x", CPU4, [east], labels={"zone": "east"}), node("y", CPU4, [A, A]))
    assert verdict(fleet, "x").outcome == "no room"
    either = workload("either", selectors=({"zone": "east"}, {"zone": "in(west, north)"}))
    west = node("y", CPU4, [A, A], labels={"zone": "west"})
    assert choose(two(node("x", CPU4, [either]), west), LIMITS).plan


def test_no_more_replicas_per_node_than_allowed() -> None:
    one = workload("one", max_per_node=1)
    assert verdict(two(node("x", CPU4, [one]), node("y", CPU4, [one])), "x").outcome == "no room"
    pair = workload("pair", max_per_node=2)
    assert choose(two(node("x", CPU4, [pair]), node("y", CPU4, [pair, A])), LIMITS).plan
    assert not choose(two(node("x", CPU4, [pair] * 2), node("y", CPU4, [pair, A, A])), LIMITS).plan


def test_a_strict_pack_group_stays_in_one_piece_and_a_pack_group_may_part() -> None:
    bundles = ({"CPU": 1}, {"CPU": 1})
    others = (node("y", CPU4, [A] * 3), node("z", CPU4, [B] * 3))
    strict = Workload("group", bundles, "STRICT_PACK")
    assert verdict(Fleet((node("x", CPU4, [strict]), *others)), "x").outcome == "no room"
    fleet = Fleet((node("x", CPU4, [Workload("group", bundles, "PACK")]), *others))
    plan = verdict(fleet, "x").plan
    assert plan is not None
    assert sorted(plan.moves["x.0"]) == ["y", "z"]
    after = {one.id: one for one in applied(fleet, plan).nodes}
    second = after[plan.moves["x.0"][1]]
    assert second.busy == "has a bundle of group, which lives on another node"


def test_a_spread_group_lies_apart() -> None:
    group = Workload("group", ({"CPU": 1}, {"CPU": 1}), "STRICT_SPREAD")
    one = two(node("x", CPU4, [group]), node("y", CPU4, [A, A]))
    assert verdict(one, "x").outcome == "no room"
    assert verdict(Fleet((*one.nodes, node("z", CPU4, [A, A]))), "x").plan


def test_a_destination_that_holds_the_weights_goes_before_one_that_fits_better() -> None:
    model = workload("model", models=(Model("s3://m", GIB),))
    full = node("full", CPU4, [A, A, A])
    warm = node("warm", CPU4, [A, A], holds={"s3://m": GIB})
    plan = choose(Fleet((node("x", CPU4, [model]), full, warm)), LIMITS).plan
    assert plan is not None
    assert (plan.moves, plan.load_bytes) == ({"x.0": ("warm",)}, 0)


def test_warmth_never_costs_a_plan() -> None:
    """Two CPUs of `large` fit only on the warm node, where the first of `small` would rather be."""
    models = (Model("s3://m", GIB),)
    large = Workload("large", ({"CPU": 2, "disk": 1},))
    fleet = Fleet(
        (
            node("x", {"CPU": 8, "disk": 1}, [workload("three", cpus=3, models=models), large]),
            node("warm", {"CPU": 4, "disk": 1}, [A], holds={"s3://m": GIB}),
            node("cold", CPU4, [A]),
        )
    )
    plan = verdict(fleet, "x").plan
    assert plan is not None
    assert (plan.moves, plan.load_bytes) == ({"x.0": ("cold",), "x.1": ("warm",)}, GIB)


def test_a_model_that_two_replicas_share_is_loaded_once() -> None:
    model = workload("model", models=(Model("s3://m", GIB),))
    fleet = two(node("x", CPU4, [model, model]), node("y", CPU4, [A, A]))
    plan = verdict(fleet, "x").plan
    assert plan is not None
    assert plan.load_bytes == GIB
    tight = Limits(max_load_bytes=GIB - 1)
    assert verdict(fleet, "x", tight).outcome == "too much to load"


def test_limits_keep_nodes_and_replicas_where_they_are() -> None:
    fleet = two(node("x", CPU4, [A, A]), node("y", CPU4, [B, B]))
    assert choose(fleet, LIMITS).plan
    assert verdict(fleet, "x", Limits(keep_nodes=2)).outcome == "fewest kept"
    assert verdict(fleet, "x", Limits(max_moves=1)).outcome == "too many moves"
    gang = workload("gang", fixed="a gang moves as one")
    assert verdict(two(node("x", CPU4, [gang]), node("y", CPU4, [B])), "x").outcome == "fixed"


def test_what_the_scaler_may_want_keeps_a_node() -> None:
    fleet = two(node("x", CPU4, [A, A]), node("y", CPU4, [B]))
    soon = Reserve("3 an hour ago", workload("c"), 2)
    kept = Fleet(fleet.nodes, reserves=(soon,))
    assert choose(fleet, LIMITS).plan
    assert {one.outcome for one in explain(kept, LIMITS)} == {"head", "needed as reserve"}
    standby = Fleet((*fleet.nodes, node("z", CPU4)), reserves=(soon,))
    assert choose(standby, LIMITS).plan


def test_what_the_autoscaler_was_asked_for_keeps_a_node() -> None:
    nodes = two(node("x", CPU4, [A]), node("y", CPU4, [B])).nodes
    assert choose(Fleet(nodes, asked=({"CPU": 1},) * 4), LIMITS).plan
    assert verdict(Fleet(nodes, asked=({"CPU": 1},) * 5), "x").outcome == "needed by request"


def test_when_ray_places_the_replicas_they_must_fit_spread_too() -> None:
    """Packed, 1 goes to y and 3 to z; spread, 1 goes to z first and 3 fits nowhere."""
    three = workload("three", cpus=3)
    fleet = Fleet((node("x", CPU4, [three, A]), node("y", CPU4, [A] * 3), node("z", CPU4, [B])))
    assert verdict(fleet, "x").plan
    assert verdict(fleet, "x", Limits(placed_by_ray=True)).outcome == "no room"
    unused = Fleet((node("x", CPU4, [A]), node("y", CPU4, [A]), node("z", CPU4)))
    assert "not in use" in verdict(unused, "x", Limits(placed_by_ray=True)).reason


def test_an_outlook_goes_on_until_nothing_fits_and_says_why() -> None:
    fleet = Fleet(tuple(node(f"n{i}", CPU4, [A]) for i in range(8)))
    seen = outlook(fleet, LIMITS)
    assert len(seen.plans) == 6
    assert sorted(len(one.replicas) for one in seen.fleet.nodes) == [4, 4]
    assert {one.outcome for one in seen.verdicts} == {"no room"}


@pytest.mark.parametrize("selector", ["a", "!a", "in(a,b)", "!in(a,b)", "in(b)"])
@pytest.mark.parametrize("value", ["a", "b", "c", None])
def test_selectors_mean_what_they_mean_to_ray(selector: str, value: str | None) -> None:
    from ray._raylet import node_labels_match_selector  # type: ignore[attr-defined]

    labels = {} if value is None else {"key": value}
    assert matches(labels, {"key": selector}) == node_labels_match_selector(
        labels, {"key": selector}
    )


SELECTORS = ((), (), ({"zone": "a"},), ({"zone": "a"}, {"zone": "b"}))


def random_workload(rnd: random.Random, name: str) -> Workload:
    bundles = tuple(
        {"GPU": rnd.choice([0, 0.2, 0.3, 0.4, 0.6, 1]), "CPU": rnd.choice([0.5, 1, 2])}
        for _ in range(rnd.choice([1, 1, 1, 2]))
    )
    return Workload(
        name,
        bundles,
        rnd.choice(["STRICT_PACK", "PACK"]) if len(bundles) > 1 else "STRICT_PACK",
        rnd.choice(SELECTORS),
        rnd.choice([None, None, 1, 2]),
        (Model(f"s3://{name}", rnd.randint(1, 9)),),
    )


def random_node(rnd: random.Random, name: str, workloads: list[Workload]) -> Node:
    total = {"GPU": rnd.choice([1, 2, 4]), "CPU": 8.0}
    labels = {"zone": rnd.choice("ab")}
    chosen: list[Workload] = []
    for one in rnd.choices(workloads, k=rnd.randint(0, 3)):
        if fits(node(name, total, [*chosen, one], labels=labels)):
            chosen.append(one)
    holds = {f"s3://{one.name}": rnd.randint(1, 9) for one in workloads if rnd.random() < 0.3}
    return node(name, total, chosen, labels=labels, holds=holds, cost=rnd.choice([1.0, 2.0]))


def fits(one: Node) -> bool:
    """Say whether what is on a node may be there: room, labels, most per node."""
    names = [replica.workload.name for replica in one.replicas]
    return all(amount > -1e-6 for amount in one.free.values()) and all(
        fits_labels(one.labels, replica.workload)
        and names.count(replica.workload.name) <= (replica.workload.max_per_node or 99)
        for replica in one.replicas
    )


def test_no_plan_of_ten_thousand_random_fleets_does_not_fit() -> None:
    rnd = random.Random(7)
    planned = missed = 0
    for _ in range(10_000):
        workloads = [random_workload(rnd, name) for name in "pqrs"]
        count = rnd.randint(2, 5)
        fleet = Fleet(tuple(random_node(rnd, f"n{i}", workloads) for i in range(count)))
        plan = choose(fleet, LIMITS).plan
        if plan is not None:
            planned += 1
            after = applied(fleet, plan)
            assert all(fits(one) for one in after.nodes)
            assert len(after.nodes) == len(fleet.nodes) - 1
            assert replicas_of(after) == replicas_of(fleet)
        elif sum(len(one.replicas) for one in fleet.nodes) <= 6:
            missed += any(can_be_emptied(fleet, one) for one in fleet.nodes)
    assert planned > 2000
    assert missed <= 20, "best fit decreasing misses few"


def replicas_of(fleet: Fleet) -> list[str]:
    return sorted(replica.id for one in fleet.nodes for replica in one.replicas)


def can_be_emptied(fleet: Fleet, target: Node) -> bool:
    """Try every placement of a node's replicas, each in one piece."""
    others = [one for one in fleet.nodes if one.id != target.id and one.replicas]
    if not target.replicas or not others:
        return False
    for places in itertools.product(others, repeat=len(target.replicas)):
        trial = {one.id: list(one.replicas) for one in others}
        for replica, place in zip(target.replicas, places, strict=True):
            trial[place.id].append(replica)
        if all(
            fits(node(one.id, one.total, [r.workload for r in trial[one.id]], labels=one.labels))
            for one in others
        ):
            return True
    return False
