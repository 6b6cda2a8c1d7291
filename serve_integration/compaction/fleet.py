"""What the planner sees. Nothing here knows of Ray.

Resources are mappings from a kind ("GPU", "CPU", "memory", any custom one) to an amount, as Ray
has them; a kind that is not there is none of it.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Resources = Mapping[str, float]
Labels = Mapping[str, str]

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]
"""How a replica's bundles may lie; a replica without a placement group is one bundle."""

_VALUES = re.compile(r"(?P<negated>!?)in\((?P<values>.*)\)")


@dataclass(frozen=True, slots=True)
class Model:
    """Weights that a replica loads."""

    uri: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Workload:
    """What every replica of one deployment needs."""

    name: str
    """`app/deployment`."""
    bundles: tuple[Resources, ...]
    strategy: Strategy = "STRICT_PACK"
    selectors: tuple[Labels, ...] = ()
    """Alternatives, the preferred first: one of them has to match the labels of the node."""
    max_per_node: int | None = None
    models: tuple[Model, ...] = ()
    fixed: str = ""
    """Why its replicas cannot be moved; empty when they can."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica, on the node that has it in its list."""

    id: str
    workload: Workload
    fixed: str = ""
    """Why just this one cannot be moved, such as bundles on several nodes."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node as it is now; `free` is what its replicas and everybody else leave."""

    id: str
    total: Resources
    free: Resources
    replicas: tuple[Replica, ...] = ()
    labels: Labels = field(default_factory=dict)
    holds: Mapping[str, int] = field(default_factory=dict)
    """URI of a model -> bytes of it that are here."""
    head: bool = False
    draining: bool = False
    busy: str = ""
    """What besides Serve keeps it from being released; empty when nothing does."""
    cost: float = 1.0
    """What it costs, in any unit that all nodes share."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Replicas that are not there yet and for which there must be room after a move."""

    why: str
    workload: Workload
    count: int


@dataclass(frozen=True, slots=True)
class Fleet:
    """The nodes, and what has to stay possible on them."""

    nodes: tuple[Node, ...]
    reserves: tuple[Reserve, ...] = ()
    """Room for what the scaler may soon want."""
    asked: tuple[Resources, ...] = ()
    """Bundles that the whole fleet must be large enough for, used room included: what
    `request_resources` asks of the autoscaler, standby nodes among it."""

    def node(self, node_id: str) -> Node:
        """Return a node; KeyError when there is none."""
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise KeyError(node_id)


@dataclass(frozen=True, slots=True)
class Plan:
    """A node to empty, and where its replicas fit: at the same time, with all that runs there."""

    node_id: str
    moves: Mapping[str, tuple[str, ...]]
    """Replica -> the node of each of its bundles; one node for a replica in one piece."""
    load_bytes: int
    """What the destinations do not hold yet."""
    saves: float
    """The node's cost."""


def need_of(workload: Workload) -> Counter[str]:
    """Return the resources of all bundles of a replica together."""
    total: Counter[str] = Counter()
    for bundle in workload.bundles:
        total.update(bundle)
    return total


def matches(labels: Labels, selector: Labels) -> bool:
    """Say whether labels satisfy a selector of Ray's: `v`, `!v`, `in(a,b)` or `!in(a,b)`."""
    return all(_matches(labels.get(key), wanted) for key, wanted in selector.items())


def _matches(value: str | None, wanted: str) -> bool:
    if found := _VALUES.fullmatch(wanted):
        listed = {one.strip() for one in found["values"].split(",")}
        return (value in listed) != bool(found["negated"])
    if wanted.startswith("!"):
        return value != wanted[1:]
    return value == wanted


def fits_labels(labels: Labels, workload: Workload) -> bool:
    """Say whether a node's labels suit a workload, by its first choice or a fallback."""
    return not workload.selectors or any(matches(labels, one) for one in workload.selectors)


def missing_bytes(node: Node, models: Mapping[str, int]) -> int:
    """Return how much of some models (URI -> size) a node would have to load."""
    return sum(max(0, size - node.holds.get(uri, 0)) for uri, size in models.items())


@dataclass(frozen=True, slots=True)
class _Coming:
    replica: Replica
    need: Counter[str]
    leads: bool
    """Whether the replica itself comes; else only a further bundle of it."""


def applied(fleet: Fleet, plan: Plan) -> Fleet:
    """Return the fleet after a plan: without the node, with its replicas where they went."""
    coming: dict[str, list[_Coming]] = {}
    for replica in fleet.node(plan.node_id).replicas:
        for place, one in _pieces(replica, plan.moves[replica.id]):
            coming.setdefault(place, []).append(one)
    others = (node for node in fleet.nodes if node.id != plan.node_id)
    nodes = tuple(_joined(node, coming.get(node.id, [])) for node in others)
    return replace(fleet, nodes=nodes)


def _pieces(replica: Replica, places: tuple[str, ...]) -> list[tuple[str, _Coming]]:
    if len(places) == 1:
        return [(places[0], _Coming(replica, need_of(replica.workload), leads=True))]
    pairs = zip(places, replica.workload.bundles, strict=True)
    return [
        (place, _Coming(replica, Counter(bundle), leads=i == 0))
        for i, (place, bundle) in enumerate(pairs)
    ]


def _joined(node: Node, coming: list[_Coming]) -> Node:
    free, holds = dict(node.free), dict(node.holds)
    busy = node.busy
    for one in coming:
        free.update({kind: free.get(kind, 0) - amount for kind, amount in one.need.items()})
        holds.update({model.uri: model.size_bytes for model in one.replica.workload.models})
        if not one.leads:
            busy = busy or part_of(one.replica.workload.name)
    replicas = (*node.replicas, *(one.replica for one in coming if one.leads))
    return replace(node, free=free, holds=holds, busy=busy, replicas=replicas)


def part_of(name: str) -> str:
    """Say why a node with a bundle of a replica that lives elsewhere cannot be emptied."""
    return f"has a bundle of {name}, which lives on another node"
