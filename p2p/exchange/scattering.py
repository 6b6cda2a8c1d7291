"""A home whose uplink is behind has those who wait for a chunk share the rest among themselves.

home                                    each receiver
POST /v1/scatter  ────────────────────>   breaks off what it is being sent, and asks for blocks
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from weightstream.p2p.exchange.flights import Flight, Scatter
from weightstream.p2p.exchange.parts import Parts
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.exchange.telling import tell_all
from weightstream.p2p.exchange.wire import WireError
from weightstream.p2p.schedule import LEAST_RECEIVERS

log = logging.getLogger(__name__)

_MOST_RECEIVERS = 64


def scatter(parts: Parts, relay: Relay, flight: Flight, receivers: tuple[str, ...]) -> None:
    """Tell all receivers, at once; returns before they have heard it. In meshes only: in a tree
    each receiver has others behind it, whom it has to send as much."""
    alive = parts.neighbours.alive()
    receivers = tuple(node for node in receivers if node in alive)[:_MOST_RECEIVERS]
    if len(receivers) < LEAST_RECEIVERS or not relay.crowd.is_mesh:
        return
    log.debug("%s chunk %d: shared by %s", flight.blob.uri, flight.chunk, ", ".join(receivers))
    message = {
        "node": parts.me,
        "blob": relay.blob.id,
        "chunk_size": relay.chunk_size,
        "chunk": flight.chunk,
        "receivers": receivers,
    }
    tell_all(parts.client, [alive[node] for node in receivers], "/v1/scatter", message)


def hear(
    message: Mapping[str, Any], known: Callable[[str, int], Relay | None], parts: Parts
) -> Mapping[str, Any]:
    """Have a chunk's rest gathered, if it comes from whoever says so, in a mesh of which all are
    members; raises WireError for a message that makes no sense."""
    names = ("node", "blob", "chunk_size", "chunk", "receivers")
    node, blob, chunk_size, chunk, receivers = (message.get(name) for name in names)
    if not isinstance(node, str) or not isinstance(blob, str):
        raise WireError("a scatter without names")
    if not isinstance(chunk_size, int) or not isinstance(chunk, int):
        raise WireError("a scatter without a chunk")
    if not isinstance(receivers, list) or not 0 < len(receivers) <= _MOST_RECEIVERS:
        raise WireError("a scatter without receivers, or with too many")
    if not all(isinstance(receiver, str) for receiver in receivers):
        raise WireError("a scatter with odd receivers")
    relay = known(blob, chunk_size)
    if relay is None or not relay.crowd.is_mesh or relay.is_mixed:
        return {}
    members = {parts.me, *parts.neighbours.alive()}
    is_sound = parts.me in receivers and len(set(receivers)) == len(receivers)
    flight = relay.flight(chunk)
    if flight is not None and is_sound and members.issuperset(receivers):
        flight.share(Scatter(node, tuple(receivers)))
    return {}
