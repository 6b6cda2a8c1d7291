"""Faults before bulk at the origin's link: homes of a crowd hold their bulk while one reads one.

    home of the chunk                       every other home
    POST /v1/hold  ───────────────────────>   reads no bulk from the origin for a moment
    reads the chunk from the origin

A fault that nobody has yet has to cross the queue that the homes' bulk keeps in front of the
origin's link, at first with the small window of a connection that was idle. Measured, 8 nodes,
links of 200 Mbit/s: the first 128 KiB took 0.3 to 0.5 s and the chunk of 1 MiB over a second; with
bulk on hold 0.1 and 0.15 s.
Where each node has all of the origin that it can take, homes have time to spare and lose nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

from weightstream.p2p.exchange.parts import Parts
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.exchange.telling import tell_all
from weightstream.p2p.exchange.wire import WireError


def hold_others(parts: Parts, relay: Relay) -> None:
    """Have the other homes hold their bulk. In meshes only: of more there are too many to tell."""
    if not relay.crowd.is_mesh or not relay.holds.begin():
        return
    alive = parts.neighbours.alive()
    homes = [alive[node] for node in relay.crowd.nodes if node in alive]
    message = {"node": parts.me, "blob": relay.blob.id, "chunk_size": relay.chunk_size}
    tell_all(parts.client, homes, "/v1/hold", message)


def is_of_a_home(
    message: Mapping[str, Any], known: Callable[[str, int], Relay | None], parts: Parts
) -> bool:
    """Say that who asks to hold is a home of a file that this node loads as well; raises WireError
    for a message that makes no sense."""
    node, blob, chunk_size = (message.get(name) for name in ("node", "blob", "chunk_size"))
    if not isinstance(node, str) or not isinstance(blob, str) or not isinstance(chunk_size, int):
        raise WireError("a hold without names")
    relay = known(blob, chunk_size)
    return relay is not None and node in relay.crowd.nodes and node in parts.neighbours.alive()
