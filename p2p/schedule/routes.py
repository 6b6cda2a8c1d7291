"""Pure policy: whom to ask for a chunk.

A chunk that somebody has, or is receiving, is asked of one of those: its home before others, then
spread over the holders of the own zone. A chunk that nobody has started is asked of its home, which
reads it from the origin and passes it on as it arrives. Nodes that are down or slow are passed over
by everybody alike, so all of them meet at the same stand-in and the origin is asked once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from blake3 import blake3

from weightstream.p2p.schedule.homes import Homes

ORIGIN = ""
"""In a route: the origin itself."""


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


@dataclass(frozen=True, slots=True)
class Route:
    """Whom to ask for a chunk, the best first; `ORIGIN` stands for the node's own gate."""

    asks: tuple[str, ...]

    @property
    def is_own(self) -> bool:
        """Say that the node itself is to read the chunk from the origin."""
        return self.asks[0] == ORIGIN


def route(view: View, chunk: int) -> Route:
    """Return whom `view.me` asks for `chunk`. The origin is always the last resort."""
    rank = view.homes.rank(chunk)
    quick = [node for node in rank if node not in view.down and node not in view.slow]
    holders = view.holders.get(chunk, frozenset())
    having = [node for node in quick if node in holders]
    if having:
        first = _spread(view, chunk, having) if rank[0] not in having else [rank[0]]
        rest = [node for node in quick if node not in first and node != view.me]
        return Route((*first, *rest, ORIGIN))
    if not quick or quick[0] == view.me:
        late = [node for node in rank if node in holders and node not in view.down]
        return Route((ORIGIN, *late))
    return Route((*(node for node in quick if node != view.me), ORIGIN))


def _spread(view: View, chunk: int, nodes: list[str]) -> list[str]:
    """Order holders: the own zone first, then by a hash that differs from asker to asker."""
    zone = view.zones.get(view.me, "")

    def key(node: str) -> tuple[bool, bytes]:
        far = view.zones.get(node, "") != zone
        return far, blake3(f"{view.me}|{node}|{chunk}".encode()).digest(length=8)

    return sorted(nodes, key=key)
