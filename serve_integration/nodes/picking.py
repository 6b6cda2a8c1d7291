"""Which nodes will get the next replicas of a deployment: a guess, as pure arithmetic.

Ray decides. By default Serve asks it to spread replicas over the nodes with room, so each node is
given one before any is given a second; with packing it fills the fullest first. Within that, nodes
that hold more of the weights come first: they cost nothing if the guess is wrong.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_SLACK = 1e-6  # Ray counts in ten-thousandths


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """What is free on a node, and what it holds of the weights."""

    node_id: str
    available: Mapping[str, float] = field(default_factory=dict)
    held_bytes: int = 0
    replicas: int = 0
    """Of this deployment, already there."""
    idle: bool = False


def pick_nodes(
    nodes: Sequence[NodeRoom],
    needs: Mapping[str, float],
    extra: int,
    *,
    pack: bool = False,
    most_per_node: int = 0,
) -> tuple[str, ...]:
    """Return the nodes that `extra` replicas of such needs would go to, each node once.

    Fewer than wanted when there is no more room: then the cluster has to grow first.
    `most_per_node` is Serve's `max_replicas_per_node`; 0 means no limit.
    """
    free = {node.node_id: dict(node.available) for node in nodes}
    placed = {node.node_id: 0 for node in nodes}

    def fits(node: NodeRoom) -> bool:
        here = node.replicas + placed[node.node_id]
        room = free[node.node_id]
        return (not most_per_node or here < most_per_node) and all(
            room.get(name, 0.0) + _SLACK >= count for name, count in needs.items() if count
        )

    def spread_rank(node: NodeRoom) -> tuple[float, ...]:
        mine = placed[node.node_id]
        return (mine, -node.held_bytes, node.replicas, -_scarcest(free[node.node_id], needs))

    def pack_rank(node: NodeRoom) -> tuple[float, ...]:
        idle = node.idle and not placed[node.node_id]
        return (idle, _scarcest(free[node.node_id], needs), -node.held_bytes)

    for _ in range(extra):
        able = [node for node in nodes if fits(node)]
        if not able:
            break
        best = min(able, key=pack_rank if pack else spread_rank)
        placed[best.node_id] += 1
        for name, count in needs.items():
            free[best.node_id][name] = free[best.node_id].get(name, 0.0) - count
    return tuple(node_id for node_id, count in placed.items() if count)


def _scarcest(room: Mapping[str, float], needs: Mapping[str, float]) -> float:
    """Return how many replicas have room by the resource that runs out first."""
    shares = [room.get(name, 0.0) / count for name, count in needs.items() if count]
    return min(shares, default=float("inf"))
