"""Where replicas fit: best fit decreasing over vectors of resources.

A vector has a number for each kind of resource that anybody asks for, GPUs first, in the ten
thousandths in which Ray itself counts, so that three thirds of a GPU are one and comparisons are
exact. Compared as tuples, vectors order nodes as Ray's own packing does: by the GPUs that are left,
then CPUs, then memory.

A thousand nodes are sorted once for every different need, the fullest first; an attempt to empty a
node then only looks at the head of that list and at the nodes that the attempt itself has changed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from weightstream.serve_integration.compaction.fleet import (
    Fleet,
    Node,
    Resources,
    Workload,
    fits_labels,
    need_of,
)

_FIRST = ("GPU", "CPU", "memory")
_UNIT = 10_000

Vector = tuple[int, ...]
Place = tuple[int, Vector]
"""A node's index, and what one piece takes there."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What has to lie on one node: a whole replica, or one of its bundles."""

    workload: Workload
    need: Vector
    counts: bool
    """Whether it counts against the most replicas per node; of several bundles the first does."""
    alike: object
    """Equal for pieces that suit the same nodes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a replica needs, in one piece and in several; either may be impossible for it."""

    whole: tuple[Piece, ...]
    parts: tuple[Piece, ...]
    size: Vector


class Space:
    """The room on a fleet's nodes. `Attempt` takes some of it away, for a trial."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.kinds = _kinds(fleet)
        self.free = [self.vector(node.free) for node in fleet.nodes]
        self.index = {node.id: i for i, node in enumerate(fleet.nodes)}
        self.active = [not node.draining for node in fleet.nodes]
        self.used = [bool(node.replicas) or node.head for node in fleet.nodes]
        self._shapes: dict[str, Shape] = {}
        self._orders: dict[object, list[int]] = {}

    def vector(self, resources: Resources) -> Vector:
        """Return resources as whole numbers, in the order of `kinds`."""
        return tuple([round(resources.get(kind, 0) * _UNIT) for kind in self.kinds])

    def shape(self, workload: Workload) -> Shape:
        """Return what a replica of a workload needs."""
        if workload.name not in self._shapes:
            self._shapes[workload.name] = self._shape(workload)
        return self._shapes[workload.name]

    def _shape(self, workload: Workload) -> Shape:
        size = self.vector(need_of(workload))
        parts = tuple(
            self._piece(workload, self.vector(bundle), counts=i == 0)
            for i, bundle in enumerate(workload.bundles)
        )
        apart = _is_apart(workload)
        whole = () if apart else (self._piece(workload, size, counts=True),)
        together = workload.strategy == "STRICT_PACK" or len(parts) < 2
        return Shape(whole, () if together else parts, size)

    @staticmethod
    def _piece(workload: Workload, need: Vector, counts: bool) -> Piece:
        selectors = tuple(tuple(sorted(one.items())) for one in workload.selectors)
        return Piece(workload, need, counts, (need, selectors))

    @cached_property
    def replicas_at(self) -> list[dict[str, int]]:
        """How many replicas of each workload a node has, for those that have a most."""
        found: list[dict[str, int]] = []
        for node in self.fleet.nodes:
            counts: dict[str, int] = {}
            for replica in node.replicas:
                if replica.workload.max_per_node:
                    name = replica.workload.name
                    counts[name] = counts.get(name, 0) + 1
            found.append(counts)
        return found

    def order(self, piece: Piece, idle: bool) -> list[int]:
        """Return the nodes on which a piece fits now, the fullest first.

        `idle`: unused nodes count, too.
        """
        key = (piece.alike, idle)
        if key not in self._orders:
            fitting = (i for i in range(len(self.free)) if self.suits(i, piece, idle))
            nodes = self.fleet.nodes
            self._orders[key] = sorted(fitting, key=lambda i: (self.free[i], nodes[i].id))
        return self._orders[key]

    def holders(self, piece: Piece, idle: bool) -> list[int]:
        """Return those of them that hold weights of the piece, the one with the most first."""
        key = (piece.alike, piece.workload.models, idle)
        if key not in self._orders:
            self._orders[key] = self._holding(piece, idle)
        return self._orders[key]

    def _holding(self, piece: Piece, idle: bool) -> list[int]:
        workload, nodes = piece.workload, self.fleet.nodes
        found = {i for model in workload.models for i in self._holders.get(model.uri, ())}
        fitting = (i for i in found if self.suits(i, piece, idle))
        return sorted(fitting, key=lambda i: (-held(nodes[i], workload), self.free[i], nodes[i].id))

    @cached_property
    def _holders(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, node in enumerate(self.fleet.nodes):
            for uri in node.holds:
                found.setdefault(uri, []).append(i)
        return found

    def suits(self, i: int, piece: Piece, idle: bool) -> bool:
        """Say whether a piece fits on a node as it is now, the most per node aside."""
        usable = self.active[i] and (idle or self.used[i])
        return (
            usable
            and covers(self.free[i], piece.need)
            and fits_labels(self.fleet.nodes[i].labels, piece.workload)
        )


@dataclass(slots=True)
class Attempt:
    """A trial of moving replicas: what it has taken so far, and where."""

    space: Space
    without: int
    """Index of the node that is to be emptied; -1 for none."""
    warm: bool = False
    idle: bool = False
    worst: bool = False
    """Take the emptiest node that fits instead of the fullest: what Ray does when it spreads."""
    room: dict[int, Vector] = field(default_factory=dict)
    more: dict[tuple[int, str], int] = field(default_factory=dict)

    def place(self, shape: Shape) -> list[int] | None:
        """Place a replica: return a node for each of its pieces; None when it fits nowhere."""
        for pieces in (shape.whole, shape.parts):
            if pieces and (places := self._place_all(pieces)) is not None:
                return places
        return None

    def _place_all(self, pieces: Sequence[Piece]) -> list[int] | None:
        room, more = dict(self.room), dict(self.more)
        apart = _is_apart(pieces[0].workload)
        places: list[int] = []
        for piece in pieces:
            place = self._best(piece, places if apart else ())
            if place is None:
                self.room, self.more = room, more
                return None
            self._take(place, piece)
            places.append(place)
        return places

    def _best(self, piece: Piece, not_on: Sequence[int]) -> int | None:
        for i in self._candidates(piece):
            if i in self.room or i == self.without or i in not_on:
                continue
            if self._may_hold(i, piece):
                return self._better(piece, not_on, i)
        return self._better(piece, not_on, None)

    def _candidates(self, piece: Piece) -> Iterator[int]:
        if self.warm:
            yield from self.space.holders(piece, self.idle)
        order = self.space.order(piece, self.idle)
        yield from reversed(order) if self.worst else order

    def _better(self, piece: Piece, not_on: Sequence[int], untouched: int | None) -> int | None:
        """Return the best of an untouched node and of those that this attempt has changed."""
        best = untouched
        for i, room in self.room.items():
            if i in not_on or not covers(room, piece.need) or not self._may_hold(i, piece):
                continue
            better = best is None or (self._key(i, piece) < self._key(best, piece)) != self.worst
            if better and self.space.suits(i, piece, self.idle):
                best = i
        return best

    def _key(self, i: int, piece: Piece) -> tuple[int, Vector]:
        here = held(self.space.fleet.nodes[i], piece.workload) if self.warm else 0
        return (-here, self.room.get(i, self.space.free[i]))

    def _may_hold(self, i: int, piece: Piece) -> bool:
        most = piece.workload.max_per_node
        if not most or not piece.counts:
            return True
        name = piece.workload.name
        return self.space.replicas_at[i].get(name, 0) + self.more.get((i, name), 0) < most

    def _take(self, i: int, piece: Piece) -> None:
        have = self.room.get(i, self.space.free[i])
        self.room[i] = tuple([a - b for a, b in zip(have, piece.need, strict=True)])
        if piece.workload.max_per_node and piece.counts:
            key = (i, piece.workload.name)
            self.more[key] = self.more.get(key, 0) + 1


def covers(room: Vector, need: Vector) -> bool:
    """Say whether there is room for what is needed; a kind that is not needed may be overdrawn."""
    for have, wanted in zip(room, need, strict=True):  # noqa: SIM110 (all() costs three times as much)
        if have < wanted and wanted > 0:
            return False
    return True


def _is_apart(workload: Workload) -> bool:
    return len(workload.bundles) > 1 and workload.strategy in ("SPREAD", "STRICT_SPREAD")


def held(node: Node, workload: Workload) -> int:
    """Return how many bytes of a workload's weights a node has."""
    return sum(min(node.holds.get(model.uri, 0), model.size_bytes) for model in workload.models)


def _kinds(fleet: Fleet) -> tuple[str, ...]:
    """Return the kinds that anybody asks for; what nobody asks for decides nothing."""
    workloads = {r.workload.name: r.workload for node in fleet.nodes for r in node.replicas}
    bundles: list[Resources] = [b for one in workloads.values() for b in one.bundles]
    bundles += [b for reserve in fleet.reserves for b in reserve.workload.bundles]
    bundles += fleet.asked
    asked = {kind for bundle in bundles for kind, amount in bundle.items() if amount > 0}
    return (*(kind for kind in _FIRST if kind in asked), *sorted(asked.difference(_FIRST)))


def covers_all(totals: Iterable[Vector], bundles: Sequence[Vector]) -> bool:
    """Say whether bundles fit into empty nodes of these sizes, best fit decreasing."""
    room = [list(total) for total in totals]
    for need in sorted(bundles, reverse=True):
        fitting = [have for have in room if covers(tuple(have), need)]
        if not fitting:
            return False
        best = min(fitting)
        best[:] = [a - b for a, b in zip(best, need, strict=True)]
    return True
