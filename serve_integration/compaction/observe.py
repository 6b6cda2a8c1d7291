"""A fleet made from what Ray and Serve say. Pure; the reading is done in `facts` and elsewhere."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from weightstream.serve_integration.compaction.facts import Bundle, ClusterFacts, NodeFacts
from weightstream.serve_integration.compaction.fleet import (
    Fleet,
    Labels,
    Node,
    Replica,
    Reserve,
    Resources,
    Workload,
    need_of,
    part_of,
)

COST_LABEL = "weightstream/cost"
"""A node's label that says what it costs; else its resources and their prices do."""

_UNNAMED = ("node:", "bundle_group_", "object_store_memory", "accelerator_type:")
_EPSILON = 1e-3  # a few of Ray's ten thousandths, from sums of fractions


@dataclass(frozen=True, slots=True)
class Placed:
    """A replica that runs, and where."""

    id: str
    workload: Workload
    node_id: str
    actor: str = ""
    """The name of its actor, and of its placement group if it has one."""


@dataclass(frozen=True, slots=True)
class View:
    """What is known besides what Ray says."""

    holds: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Node -> URI -> bytes that it holds."""
    prices: Mapping[str, float] = field(default_factory=dict)
    """Kind of resource -> what one of it costs."""
    reserves: tuple[Reserve, ...] = ()
    room: Mapping[str, Resources] | None = None
    """Node -> what is free there, where somebody knows better than the GCS."""


def fleet_of(facts: ClusterFacts, placed: Iterable[Placed], view: View) -> Fleet:
    """Return the fleet; replicas on nodes that are gone are left out."""
    on_node: dict[str, list[Placed]] = {}
    parts: dict[str, list[tuple[Placed, Bundle]]] = {}
    for one in placed:
        on_node.setdefault(one.node_id, []).append(one)
        for bundle in facts.groups.get(one.actor, ()):
            parts.setdefault(bundle.node_id, []).append((one, bundle))
    nodes = tuple(
        _node(node, on_node.get(node.id, []), parts.get(node.id, []), facts, view)
        for node in facts.nodes
    )
    return Fleet(nodes, view.reserves, facts.asked)


def _node(
    node: NodeFacts,
    placed: list[Placed],
    parts: list[tuple[Placed, Bundle]],
    facts: ClusterFacts,
    view: View,
) -> Node:
    free = node.free if view.room is None else view.room.get(node.id, node.free)
    return Node(
        node.id,
        node.total,
        free,
        tuple(Replica(one.id, one.workload) for one in placed),
        node.labels,
        view.holds.get(node.id, {}),
        node.head,
        node.draining,
        _busy(node, placed, parts, facts),
        cost_of(node.total, node.labels, view.prices),
    )


def _busy(
    node: NodeFacts,
    placed: list[Placed],
    parts: list[tuple[Placed, Bundle]],
    facts: ClusterFacts,
) -> str:
    """Say what besides the replicas of a node would keep it; empty when nothing would."""
    if actor := facts.foreign.get(node.id):
        return f"an actor that is not of Serve runs here: {actor}"
    for replica, _ in parts:
        if replica.node_id != node.id:
            return part_of(replica.workload.name)
    ours: Counter[str] = Counter()
    for _, bundle in parts:
        ours.update(bundle.resources)
    for replica in placed:
        if replica.actor not in facts.groups:
            ours.update(need_of(replica.workload))
    for kind in sorted(node.total):
        other = node.total[kind] - node.free.get(kind, 0) - ours[kind]
        if other > _EPSILON and not kind.startswith(_UNNAMED) and "_group_" not in kind:
            return f"{other:g} {kind} in use by something that is not of Serve"
    return ""


def cost_of(total: Resources, labels: Labels, prices: Mapping[str, float]) -> float:
    """Return what a node costs: its label, else its resources at their prices, else 1."""
    try:
        return float(labels[COST_LABEL])
    except (KeyError, ValueError):
        return sum(total.get(kind, 0) * price for kind, price in prices.items()) or 1.0
