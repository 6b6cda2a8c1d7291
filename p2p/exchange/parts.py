"""What all relays of one exchange share."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store import Store
from weightstream.p2p.exchange.carrier import Carrier
from weightstream.p2p.exchange.client import PeerClient
from weightstream.p2p.exchange.flights import Shelf
from weightstream.p2p.exchange.gate import Gate
from weightstream.p2p.members import Member
from weightstream.p2p.schedule import is_slow

_DAWDLE_S = 30.0


class Neighbours:
    """Everybody else, as the whole exchange sees them. Thread-safe."""

    def __init__(self, members: Callable[[], tuple[Member, ...]], client: PeerClient) -> None:
        self._members = members
        self._client = client
        self._banned: set[str] = set()
        self._dawdling_until_s: dict[str, float] = {}
        self._zones: dict[str, str] = {}

    def zones(self) -> Mapping[str, str]:
        """Return everybody's zone, also of those who are down: trees stay as they are."""
        self._zones.update({member.node: member.zone for member in self._members()})
        return self._zones

    def alive(self) -> Mapping[str, Member]:
        """Return who answers now, by name."""
        return {m.node: m for m in self._members() if m.node not in self._banned}

    def slow(self) -> frozenset[str]:
        """Return who gives far less than the others."""
        paces, dawdling = self._client.paces.now(), tuple(self._dawdling_until_s)
        return frozenset(node for node in paces if is_slow(paces, node)).union(
            node for node in dawdling if self.dawdles(node)
        )

    def is_slow(self, node: str, times: float) -> bool:
        """Say that a node gives less than a `times`-th of what others give."""
        return is_slow(self._client.paces.now(), node, times)

    def dawdles(self, node: str) -> bool:
        """Say that another transport found a node slow lately: there may be nobody here to compare
        it with."""
        return time.monotonic() < self._dawdling_until_s.get(node, 0.0)

    def dawdle(self, node: str) -> None:
        """Hear that another transport found a node slow; it may be seen differently later."""
        self._dawdling_until_s[node] = time.monotonic() + _DAWDLE_S

    def is_banned(self, node: str) -> bool:
        """Say that a node is never asked again."""
        return node in self._banned

    def ban(self, node: str) -> None:
        """Never ask a node again: it gave bytes that are not what it says."""
        self._banned.add(node)


@dataclass(frozen=True, slots=True)
class Parts:
    """What relays share."""

    me: str
    store: Store | None
    shelf: Shelf
    gate: Gate
    client: PeerClient
    neighbours: Neighbours
    suspect: Callable[[str, str], None]
    may_read: Callable[[Blob], bool]
    """Whether this node may read the blob's origin."""
    digest_of: Callable[[Blob, int, int], bytes | None]
    """The published hash of a chunk, if there is one."""
    carrier: Carrier | None = None
    """The swarm, where bulk goes through it."""
