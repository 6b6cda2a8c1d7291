"""Before a deployment gets more replicas: have the nodes that will get them hold its weights."""

from collections import Counter
from collections.abc import Mapping, Sequence

from weightstream.serve_integration.nodes.fleet import node_states, served_as
from weightstream.serve_integration.nodes.holding import holdings
from weightstream.serve_integration.nodes.picking import NodeRoom, pick_nodes
from weightstream.serve_integration.nodes.warming import Warming, uris_of
from weightstream.serve_integration.registry import Deployment


def prewarm(deployment: Deployment, extra: int) -> Warming:
    """Warm the nodes that the next `extra` replicas would go to, as far as there is room.

    Returns at once and raises nothing: what goes wrong is for `Warming.wait` to raise, and costs a
    replica the wait for its weights, which it would have had anyway.
    """

    def plan() -> tuple[Sequence[str], Sequence[str]]:
        uris = uris_of(deployment)
        served = served_as(deployment)
        rooms = _rooms(uris, Counter(served.replica_nodes))
        picked = pick_nodes(rooms, served.needs, extra, most_per_node=served.most_per_node)
        return uris, picked

    return Warming(plan)


def _rooms(uris: Sequence[str], replicas: Mapping[str, int]) -> list[NodeRoom]:
    held = {
        node_id: sum(one.held_bytes for one in models.values())
        for node_id, models in holdings(uris).items()
    }
    return [
        NodeRoom(
            node.id,
            node.available,
            held.get(node.id, 0),
            replicas.get(node.id, 0),
            node.status == "IDLE",
        )
        for node in node_states().values()
        if node.is_usable
    ]
