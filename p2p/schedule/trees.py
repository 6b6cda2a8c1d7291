"""Whom to ask in a large crowd: a tree per chunk, so that nobody is asked by everybody.

In a full mesh a home gives its chunk to all others: with 1,000 nodes 1,000 connections, and the
chunk waits for one uplink while 999 are idle. Here every chunk has a tree of bounded fan-out with
its home at the root, and bytes are passed down while they arrive. The trees of `fan_out` chunks in
turn have different inner nodes (as the stripes of SplitStream have), so every node passes on as
much as it receives: inner in one of them, a leaf in the others.

The home itself gives to one node alone. It is an inner node of other trees at the same time, and
what it gave besides would slow all below it there: simulated, 100 nodes, 1.14 of the bound where it
gives to four (1.29 with four zones), less where it gives to one.

A zone has a tree of its own whose head asks across the border: a chunk enters a zone once. So have
those who joined late together: the head asks who came before, who are ahead.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from blake3 import blake3

from weightstream.p2p.schedule.homes import Homes, turned

_ZONES = 2
"""How many zones the head of a zone gives a chunk to."""


def parent(
    homes: Homes, chunk: int, node: str, fan_out: int, zones: Mapping[str, str] | None = None
) -> str | None:
    """Return whom `node` asks for `chunk` when nobody is down; None for the home itself."""
    return next(ancestors(homes, chunk, node, fan_out, zones), None)


def ancestors(
    homes: Homes, chunk: int, node: str, fan_out: int, zones: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield who stands between `node` and the origin: its parent first, the home last."""
    at: str | None = node
    for batch in homes.before(chunk, node):
        root = next(turned(batch, chunk))
        yield from _climb(batch, chunk, at, root, fan_out, zones or {})
        at = None
    founders = homes.founders(chunk)
    if founders:
        yield from _climb(founders, chunk, at, homes.home(chunk), fan_out, zones or {})


def _climb(
    nodes: tuple[str, ...],
    chunk: int,
    at: str | None,
    root: str,
    fan_out: int,
    zones: Mapping[str, str],
) -> Iterator[str]:
    """Yield who stands above `at` in the tree of `nodes`; the root alone when it comes from below
    that tree."""
    if at is None:
        yield root
        return
    layout = _layout(nodes, tuple(zones.get(node, "") for node in nodes) if zones else ())
    if at not in layout.place:
        at = layout.adopter(chunk, at, zones.get(at, ""))
        yield at
    while at != root:
        at = layout.above(chunk, at, root, fan_out)
        yield at


@dataclass(frozen=True, slots=True)
class _Layout:
    """The crowd by zone; zones in the order of their first node."""

    zones: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]
    place: Mapping[str, tuple[int, int]]
    """By node: its zone, and its index there."""

    def above(self, chunk: int, node: str, home: str, fan_out: int) -> str:
        """Return the parent of a node that is not the home."""
        zone, index = self.place[node]
        home_zone, home_index = self.place[home]
        root = home_index if zone == home_zone else None
        position = self._position(chunk, zone, index, root, fan_out)
        if root is not None:  # the home gives to one, who heads the tree of its zone
            above = 0 if position == 1 else 1 + (position - 2) // fan_out
            return self._node(chunk, zone, above, root, fan_out)
        if position:
            return self._node(chunk, zone, (position - 1) // fan_out, None, fan_out)
        turn = (zone - home_zone) % len(self.zones)
        upper = ((turn - 1) // min(fan_out, _ZONES) + home_zone) % len(self.zones)
        root = home_index if upper == home_zone else None
        head = min(1, len(self.zones[upper]) - 1) if root is not None else 0
        return self._node(chunk, upper, head, root, fan_out)

    def adopter(self, chunk: int, node: str, zone: str) -> str:
        """Return whom a node outside of the crowd asks: one of its zone, if any."""
        nodes = self.zones[self.names.index(zone) if zone in self.names else 0]
        digest = blake3(f"{node}|{chunk}".encode()).digest(length=8)
        return nodes[int.from_bytes(digest, "big") % len(nodes)]

    def _start(self, chunk: int, zone: int, fan_out: int) -> int:
        """Return the index that the zone's tree of this chunk begins at."""
        count = len(self.zones[zone])
        arc = -(-count // fan_out)
        return (chunk % fan_out * arc + chunk // fan_out) % count

    def _position(self, chunk: int, zone: int, index: int, root: int | None, fan_out: int) -> int:
        """Return a node's position in its zone's tree; `root` is moved to the front."""
        count, start = len(self.zones[zone]), self._start(chunk, zone, fan_out)
        position = (index - start) % count
        if root is None:
            return position
        if index == root:
            return 0
        return position + (position < (root - start) % count)

    def _node(self, chunk: int, zone: int, position: int, root: int | None, fan_out: int) -> str:
        """Return the node at a position: the inverse of `_position`."""
        nodes = self.zones[zone]
        start = self._start(chunk, zone, fan_out)
        if root is not None:
            if position == 0:
                return nodes[root]
            position -= position <= (root - start) % len(nodes)
        return nodes[(start + position) % len(nodes)]


@lru_cache(maxsize=16)
def _layout(order: tuple[str, ...], zone_of: tuple[str, ...]) -> _Layout:
    by_zone: dict[str, list[str]] = {}
    for node, zone in zip(order, zone_of or ("",) * len(order), strict=True):
        by_zone.setdefault(zone, []).append(node)
    place = {
        node: (zone, index)
        for zone, nodes in enumerate(by_zone.values())
        for index, node in enumerate(nodes)
    }
    return _Layout(tuple(map(tuple, by_zone.values())), tuple(by_zone), place)
