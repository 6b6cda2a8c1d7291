"""Pure policy: whom to ask for a chunk.

A chunk that somebody has, or is receiving, is asked of one of those: its home before others, then
spread over the holders of the own zone. A chunk that nobody has started is asked of its home, which
reads it from the origin and passes it on as it arrives; in a large crowd it is asked of a parent in
the chunk's tree instead, which asks its own. Nodes that are down or slow are passed over by
everybody alike, so all of them meet at the same stand-in and the origin is asked once.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from weightstream.p2p.schedule.homes import Homes, turned
from weightstream.p2p.schedule.trees import ancestors

ORIGIN = ""
"""In a route: the origin itself."""

_STAND_INS = 3
"""How many of those that read a chunk when its home does not are asked before the origin is."""


@dataclass(frozen=True, slots=True)
class View:
    """What one node knows of a blob's crowd."""

    me: str
    homes: Homes
    holders: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """By chunk: who has it or is receiving it, as far as is known; the node itself left out."""
    down: frozenset[str] = frozenset()
    slow: frozenset[str] = frozenset()
    zones: Mapping[str, str] = field(default_factory=dict)
    """By node. Of nodes that are down too: trees are drawn over all of the crowd, or everybody
    would have another parent each time that one dies."""
    fan_out: int | None = None
    """How many nodes ask one for the same chunk; None: all ask its home, a full mesh."""
    moved: Mapping[int, str] = field(default_factory=dict)
    """By chunk: who has taken it over from its home, as far as the two know; see `taking`."""


@dataclass(frozen=True, slots=True)
class Route:
    """Whom to ask for a chunk, the best first; `ORIGIN` stands for the node's own gate."""

    asks: tuple[str, ...]
    relays: frozenset[str] = frozenset()
    """Those of them that bring the chunk from their own parent when they lack it. All others but
    the home are asked to stand in for it, or two nodes that take each other for the one who reads
    it could wait for each other."""

    @property
    def is_own(self) -> bool:
        """Say that the node itself is to read the chunk from the origin."""
        return self.asks[0] == ORIGIN


def route(view: View, chunk: int) -> Route:
    """Return whom `view.me` asks for `chunk`. The origin is always the last resort."""
    taker = view.moved.get(chunk)
    if taker == view.me:
        return Route((ORIGIN, *_still(view, view.holders.get(chunk, frozenset()))))
    if taker is not None and taker not in view.down:
        rest = (ask for ask in _home_route(view, chunk).asks if ask != taker)
        return Route((taker, *rest))
    return _home_route(view, chunk)


def acting_home(view: View, chunk: int) -> str:
    """Return who reads a chunk from the origin that nobody took over: its home, or who stands in
    for one that is down."""
    rank = view.homes.ranked(chunk)
    return next((node for node in rank if node not in view.down), view.me)


def _home_route(view: View, chunk: int) -> Route:
    """Return whom to ask for a chunk that nobody took over."""
    holders = view.holders.get(chunk, frozenset())
    if view.fan_out is not None and len(view.homes.order) > view.fan_out + 1:
        return _tree_route(view, chunk, holders, view.fan_out)
    rank = view.homes.rank(chunk)
    others = sorted(holders.difference(rank))  # they have it, but may not read the origin
    quick = [node for node in _quick(view, rank) if node != view.me]
    having = [node for node in (*quick, *_quick(view, others)) if node in holders]
    if before := view.homes.before(chunk, view.me):
        return _late_route(view, chunk, before, having, quick)
    if having:
        first = _spread(view, chunk, having) if rank[0] not in having else [rank[0]]
        return Route((*dict.fromkeys((*first, *quick)), ORIGIN))
    if next(_quick(view, rank), view.me) == view.me:
        return Route((ORIGIN, *_still(view, holders)))
    return Route((*quick, ORIGIN))


def _late_route(
    view: View,
    chunk: int,
    before: tuple[tuple[str, ...], ...],
    having: list[str],
    quick: list[str],
) -> Route:
    """Ask who came just before: those are ahead, and nobody else asks them.

    Of those who came together one asks for it, and the others ask that one.
    """
    firsts = (next(_quick(view, turned(batch, chunk)), view.me) for batch in before)
    above = [node for node in firsts if node != view.me]
    if not above and not having and next(_quick(view, view.homes.ranked(chunk)), "") == view.me:
        return Route((ORIGIN, *_still(view, view.holders.get(chunk, frozenset()))))
    near = _spread(view, chunk, having)
    return Route((*dict.fromkeys((*above, *near, *quick)), ORIGIN), frozenset(above))


def _tree_route(view: View, chunk: int, holders: frozenset[str], fan_out: int) -> Route:
    having = [node for node in _quick(view, holders) if node != view.me]
    if len(having) * fan_out >= len(view.homes.order):  # enough of them to be asked at random
        return Route((*_spread(view, chunk, having)[: fan_out + _STAND_INS], ORIGIN))
    stand_ins: list[str] = []
    for node in _quick(view, view.homes.ranked(chunk)):
        if node == view.me and not stand_ins:
            near = _spread(view, chunk, having)
            return Route((*near, ORIGIN) if near else (ORIGIN, *_still(view, holders)))
        if node != view.me:
            stand_ins.append(node)
        if len(stand_ins) == _STAND_INS:
            break
    above = tuple(_quick(view, ancestors(view.homes, chunk, view.me, fan_out, view.zones)))
    return Route((*dict.fromkeys((*above, *stand_ins)), ORIGIN), frozenset(above))


def _quick(view: View, nodes: Iterable[str]) -> Iterator[str]:
    return (node for node in nodes if node not in view.down and node not in view.slow)


def _still(view: View, holders: frozenset[str]) -> Iterator[str]:
    """Yield holders that are slow but up, for a node whose own gate may fail."""
    return (n for n in sorted(holders) if n not in view.down and n != view.me)


def _spread(view: View, chunk: int, nodes: list[str]) -> list[str]:
    """Order holders: the own zone first, then by a hash that differs from asker to asker."""
    zone = view.zones.get(view.me, "")

    def key(node: str) -> tuple[bool, bytes]:
        far = view.zones.get(node, "") != zone
        return far, blake3(f"{view.me}|{node}|{chunk}".encode()).digest(length=8)

    return sorted(nodes, key=key)
