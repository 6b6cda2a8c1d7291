"""Which node to empty next: a pure function of the fleet and of limits.

Every node is looked at, the one with the fewest replicas for its cost first, and gets a verdict.
A node can be emptied when all its replicas fit elsewhere at the same time, on nodes that are in use
anyway, and when what must stay possible still fits afterwards. Best fit decreasing finds nearly
every such node; one that it misses is merely kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from weightstream.serve_integration.compaction.fleet import (
    Fleet,
    Node,
    Plan,
    Replica,
    applied,
    missing_bytes,
)
from weightstream.serve_integration.compaction.packing import Attempt, Shape, Space, covers_all

Outcome = Literal[
    "can be emptied",
    "head",
    "draining",
    "unused",
    "busy",
    "fixed",
    "no room",
    "too much to load",
    "too many moves",
    "needed as reserve",
    "needed by request",
    "fewest kept",
]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may not do."""

    keep_nodes: int = 1
    """Worker nodes in use that stay, whatever fits."""
    max_moves: int = 64
    """Replicas that move at once."""
    max_load_bytes: int = 1 << 40
    """Weights that the destinations may have to load for one node."""
    placed_by_ray: bool = False
    """Ray will choose the destinations, spreading: the replicas have to fit that way, too."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a node is emptied, or why not."""

    node_id: str
    outcome: Outcome
    reason: str
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The next node to empty, if any, and what was found about each node until then."""

    plan: Plan | None
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What emptying one node after the other comes to."""

    plans: tuple[Plan, ...]
    verdicts: tuple[Verdict, ...]
    """About the nodes that are left then: why not more."""
    fleet: Fleet
    """As it would be then."""


@dataclass(slots=True)
class _Judge:
    fleet: Fleet
    limits: Limits
    space: Space = field(init=False)

    def __post_init__(self) -> None:
        self.space = Space(self.fleet)

    def verdicts(self) -> Iterator[Verdict]:
        """Yield a verdict for each node, the best to empty first."""
        order = sorted(range(len(self.fleet.nodes)), key=self._rank)
        workers = sum(_is_worker(node) for node in self.fleet.nodes)
        for i in order:
            node = self.fleet.nodes[i]
            yield self._unfit(node) or self._few(node, workers) or self._planned(i, node)

    def _rank(self, i: int) -> tuple[float, float, str]:
        node = self.fleet.nodes[i]
        return (len(node.replicas) / max(node.cost, 1e-9), -node.cost, node.id)

    def _unfit(self, node: Node) -> Verdict | None:
        """Return why a node is not to be touched at all."""
        if node.head:
            return Verdict(node.id, "head", "the head node is never released")
        if node.draining:
            return Verdict(node.id, "draining", "already on its way out")
        if node.busy:
            return Verdict(node.id, "busy", node.busy)
        if not node.replicas:
            return Verdict(node.id, "unused", "no replicas: the autoscaler may take it")
        return None

    def _few(self, node: Node, workers: int) -> Verdict | None:
        """Return why a node is kept, whatever would fit."""
        if workers <= self.limits.keep_nodes:
            kept = self.limits.keep_nodes
            return Verdict(node.id, "fewest kept", f"{kept} worker nodes in use are to stay")
        if len(node.replicas) > self.limits.max_moves:
            reason = f"{len(node.replicas)} replicas, {self.limits.max_moves} may move at once"
            return Verdict(node.id, "too many moves", reason)
        for replica in node.replicas:
            if why := replica.fixed or replica.workload.fixed:
                return Verdict(node.id, "fixed", f"{replica.workload.name}: {why}")
        return None

    def _planned(self, i: int, node: Node) -> Verdict:
        replicas = sorted(node.replicas, key=lambda r: self._shape(r).size, reverse=True)
        found = self._placed(i, replicas, warm=True)
        if isinstance(found, Replica):
            found = self._placed(i, replicas, warm=False)
        if isinstance(found, Replica):
            return Verdict(node.id, "no room", self._no_room(i, found))
        attempt, places = found
        plan = self._plan(node, places)
        if plan.load_bytes > self.limits.max_load_bytes:
            most = self.limits.max_load_bytes
            reason = f"{plan.load_bytes} bytes of weights to load, {most} are allowed"
            return Verdict(node.id, "too much to load", reason)
        return self._left_over(i, node, attempt) or self._spread(i, node, replicas, plan)

    def _shape(self, replica: Replica) -> Shape:
        return self.space.shape(replica.workload)

    def _placed(
        self, i: int, replicas: list[Replica], warm: bool
    ) -> tuple[Attempt, dict[str, list[int]]] | Replica:
        """Place all replicas of a node; return the one that did not fit when one did not."""
        attempt = Attempt(self.space, without=i, warm=warm)
        places: dict[str, list[int]] = {}
        for replica in replicas:
            place = attempt.place(self._shape(replica))
            if place is None:
                return replica
            places[replica.id] = place
        return attempt, places

    def _plan(self, node: Node, places: Mapping[str, list[int]]) -> Plan:
        nodes = self.fleet.nodes
        coming: dict[int, dict[str, int]] = {}
        for replica in node.replicas:
            for place in places[replica.id]:
                models = coming.setdefault(place, {})
                models.update({model.uri: model.size_bytes for model in replica.workload.models})
        load_bytes = sum(missing_bytes(nodes[place], models) for place, models in coming.items())
        moves = {r.id: tuple(nodes[place].id for place in places[r.id]) for r in node.replicas}
        return Plan(node.id, moves, load_bytes, saves=node.cost)

    def _left_over(self, i: int, node: Node, attempt: Attempt) -> Verdict | None:
        """Return what would no longer fit once the node is gone."""
        attempt.idle = True
        for reserve in self.fleet.reserves:
            shape = self.space.shape(reserve.workload)
            for number in range(reserve.count):
                if attempt.place(shape) is None:
                    reason = f"no room for {reserve.count - number} of {reserve.count} more of "
                    reason += f"{reserve.workload.name} without it ({reserve.why})"
                    return Verdict(node.id, "needed as reserve", reason)
        if self.fleet.asked and not self._answers_requests(i):
            reason = "without it the nodes are too small for what request_resources asks"
            return Verdict(node.id, "needed by request", reason)
        return None

    def _answers_requests(self, without: int) -> bool:
        totals = [
            self.space.vector(node.total)
            for i, node in enumerate(self.fleet.nodes)
            if i != without and self.space.active[i]
        ]
        return covers_all(totals, [self.space.vector(bundle) for bundle in self.fleet.asked])

    def _spread(self, i: int, node: Node, replicas: list[Replica], plan: Plan) -> Verdict:
        """Return the plan, or why Ray's own placement could not follow it."""
        if not self.limits.placed_by_ray:
            return Verdict(node.id, "can be emptied", _summary(plan), plan)
        if unused := [n.id for n in self.fleet.nodes if _takes_spread(n)]:
            reason = f"Ray would move its replicas to a node that is not in use: {unused[0][:8]}"
            return Verdict(node.id, "no room", reason)
        for order in (replicas, replicas[::-1]):
            attempt = Attempt(self.space, without=i, worst=True)
            for replica in order:
                if attempt.place(self._shape(replica)) is None:
                    reason = f"fits only when packed, and Ray spreads: {replica.workload.name}"
                    return Verdict(node.id, "no room", reason)
        return Verdict(node.id, "can be emptied", _summary(plan), plan)

    def _no_room(self, i: int, replica: Replica) -> str:
        """Say what one replica did not find: a node at all, or one beside the others."""
        alone = Attempt(self.space, without=i).place(self._shape(replica))
        rest = "beside the others of this node" if alone is not None else "on any other node in use"
        return f"{replica.workload.name} does not fit {rest}"


def choose(fleet: Fleet, limits: Limits) -> Decision:
    """Return the next node to empty; the verdicts end with it, or speak of all when there is none.

    Never a node whose replicas do not fit elsewhere.
    """
    verdicts: list[Verdict] = []
    for verdict in _Judge(fleet, limits).verdicts():
        verdicts.append(verdict)
        if verdict.plan is not None:
            return Decision(verdict.plan, tuple(verdicts))
    return Decision(None, tuple(verdicts))


def explain(fleet: Fleet, limits: Limits) -> tuple[Verdict, ...]:
    """Return a verdict for every node, the one to empty next first among those that can be."""
    return tuple(_Judge(fleet, limits).verdicts())


def outlook(fleet: Fleet, limits: Limits) -> Outlook:
    """Return every node that can be emptied one after the other, and why not more."""
    plans: list[Plan] = []
    while (decision := choose(fleet, limits)).plan is not None:
        plans.append(decision.plan)
        fleet = applied(fleet, decision.plan)
    return Outlook(tuple(plans), decision.verdicts, fleet)


def _is_worker(node: Node) -> bool:
    return bool(node.replicas) and not node.head and not node.draining


def _takes_spread(node: Node) -> bool:
    return not (node.replicas or node.head or node.draining) and any(
        node.free.get(kind, 0) > 0 for kind in ("CPU", "GPU")
    )


def _summary(plan: Plan) -> str:
    places = {place for node_ids in plan.moves.values() for place in node_ids}
    text = f"{len(plan.moves)} replicas fit on {len(places)} other nodes"
    return f"{text}, {plan.load_bytes} bytes to load" if plan.load_bytes else text
