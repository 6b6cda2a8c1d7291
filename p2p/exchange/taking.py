"""Chunks change hands: a node that has begun all of its own takes over what a home has not begun.

    taker                                   home
    POST /v1/take  ───────────────────────>   gives a chunk away, or says that it has none
    reads it from the origin                  asks the taker, as do all whom it sends there

The home decides alone, under the relay's lock: a chunk is given once, and read once. Founders only:
who came late asks those before it, and each link is used once. Simulated, 8 nodes of which some
came 0.1 s late: 1.01 to 1.14 of the bound, where late comers take as well 1.13 to 1.55.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from weightstream.p2p.exchange.client import PeerError
from weightstream.p2p.exchange.flights import Flight
from weightstream.p2p.exchange.parts import Parts
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.exchange.wire import WireError
from weightstream.p2p.schedule import givers

log = logging.getLogger(__name__)

_PATIENCE_S = 60.0
_LOOK_S = 0.1


class Taking:
    """What one reader's plan of one blob takes; not thread-safe."""

    def __init__(self, parts: Parts, relay: Relay) -> None:
        self._parts = parts
        self._relay = relay
        self._crowd: tuple[tuple[str, ...], frozenset[str]] = (), frozenset()
        self._spent: set[str] = set()
        """Who had nothing to give: nor will they, unless homes are drawn anew or one dies."""

    def take(self, lacking: Callable[[], Iterator[int]]) -> bool:
        """Take one chunk over and return True; it is this node's to read then.

        Waits for the homes' answers, and until a chunk that was on its way here already is over.
        """
        relay = self._relay
        nodes = relay.crowd.nodes
        if len(nodes) < 2 or not relay.crowd.is_founded_here or not relay.crowd.is_mesh:
            return False
        if not self._parts.may_read(relay.blob):
            return False
        view = relay.view()
        if (crowd := (nodes, view.down)) != self._crowd:
            self._crowd, self._spent = crowd, set()
        if len(self._spent) >= len(nodes):
            return False
        for node in givers(view, lacking(), lambda node: node not in self._spent):
            if self._take_of(node):
                return True
            self._spent.add(node)
        return False

    def _take_of(self, node: str) -> bool:
        relay = self._relay
        member = self._parts.neighbours.alive().get(node)
        if member is None:
            return False
        message = {"node": self._parts.me, "blob": relay.blob.id, "chunk_size": relay.chunk_size}
        relay.asks_to_take = True
        try:
            chunk = self._parts.client.tell(member, "/v1/take", message).get("chunk")
            if not isinstance(chunk, int) or not 0 <= chunk < relay.n_chunks:
                return False
            relay.crowd.move(chunk, self._parts.me)
        except (PeerError, WireError) as error:
            log.debug("nothing taken over: %s", error)
            return False
        finally:
            relay.asks_to_take = False
        log.debug("took chunk %d of %s over from %s", chunk, relay.blob.uri, node)
        flight = relay.flight(chunk)
        if flight is not None:
            flight.is_taken = True
            _wait_for_bringer(flight)
        return True


def _wait_for_bringer(flight: Flight) -> None:
    """Wait while the thread that has asked a peer for it brings it from the origin: one stream is
    enough. Not when it comes to the gate, whose thread this is."""
    until_s = time.monotonic() + _PATIENCE_S
    while not flight.is_at_gate and time.monotonic() < until_s:
        if flight.wait_over(_LOOK_S):
            return


def give(
    message: Mapping[str, Any], known: Callable[[str, int], Relay | None], parts: Parts
) -> Mapping[str, Any]:
    """Answer who wants to take a chunk over; raises WireError for a message that makes no sense.

    Who is banned or does not answer gets none: nobody would get the chunk from it.
    """
    node, blob, chunk_size = (message.get(name) for name in ("node", "blob", "chunk_size"))
    if not isinstance(node, str) or not isinstance(blob, str) or not isinstance(chunk_size, int):
        raise WireError("a take without names")
    relay = known(blob, chunk_size)
    if relay is None or node not in parts.neighbours.alive():
        return {}
    if node not in relay.crowd.nodes or not relay.crowd.is_mesh:
        return {}
    chunk = relay.give_away(node)
    return {} if chunk is None else {"chunk": chunk}
