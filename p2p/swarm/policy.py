"""Pure policy: when the swarm is waited for, whom a node connects to, who is left out."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from blake3 import blake3

_STALLED_S = 3.0
_PATIENCE_S = 20.0
_TRICKLE = 8
_FEW = 4
_SMOOTH_S = 1.0
_MOST_FRIENDS = 40
_MOST_STRIKES = 3


@dataclass(frozen=True, slots=True)
class Rate:
    """What a swarm brings, smoothed, and the best that it brought."""

    now_bytes_s: float = 0.0
    best_bytes_s: float = 0.0

    def after(self, got_bytes: int, took_s: float) -> "Rate":
        """Return the rate once `got_bytes` more have come, in `took_s`."""
        weight = min(1.0, took_s / _SMOOTH_S)
        now = self.now_bytes_s + (got_bytes / max(took_s, 1e-6) - self.now_bytes_s) * weight
        return Rate(now, max(now, self.best_bytes_s))

    @property
    def keeps_up(self) -> bool:
        """Say that it is not a trickle: that of one slow member, when all else has come."""
        return self.now_bytes_s > 0 and self.now_bytes_s * _TRICKLE >= self.best_bytes_s


def is_stalled(slow_s: float) -> bool:
    """Say that a swarm that did not keep up for so long is not waited for."""
    return slow_s > _STALLED_S


def dawdlers(homes: Iterable[str], n_homes: int) -> frozenset[str]:
    """Return who is slow, given the homes of the chunks that are waited for in vain.

    A few homes are slow themselves. Where many chunks of many homes are missing the swarm is slow,
    or this node: were all homes passed over, everybody would go to the origin.
    """
    found = Counter(homes)
    return frozenset(found) if len(found) * _FEW <= n_homes else frozenset()


def is_impatient(waited_s: float) -> bool:
    """Say that a reader waits for too long, though the swarm moves: pieces come in any order, and
    the one chunk that is read next may come last."""
    return waited_s > _PATIENCE_S


def friends(me: str, nodes: Iterable[str]) -> Sequence[str]:
    """Return to whom a node connects: all of a small crowd, else some, others for each node.

    With as many as these the graph of all connections hangs together, and every piece is near.
    """

    def key(node: str) -> bytes:
        return blake3(f"{me}|{node}".encode()).digest(length=8)

    return sorted((node for node in nodes if node != me), key=key)[:_MOST_FRIENDS]


class Verdict(Enum):
    """What is done about who sent a wrong block."""

    NOTHING = auto()
    LEFT_OUT = auto()
    """Not connected to any more."""
    BANNED = auto()
    """Nor asked for anything else."""


def verdict(stands_by: bool, strikes: int) -> Verdict:
    """Judge a sender that has sent wrong bytes of `strikes` chunks.

    Pieces are passed on before they are checked, so wrong bytes may come from an honest node: it
    finds them itself soon, and does not stand by that chunk then. Who does has lied.
    """
    if stands_by:
        return Verdict.BANNED
    if strikes >= _MOST_STRIKES:
        return Verdict.LEFT_OUT
    return Verdict.NOTHING


def senders_of(
    wrong: Mapping[int, set[int]], senders: Mapping[int, Mapping[str, Sequence[int]]]
) -> frozenset[str]:
    """Return the hosts that sent a wrong block; both are by piece, blocks by number in it."""
    return frozenset(
        host
        for piece, blocks in wrong.items()
        for host, sent in senders.get(piece, {}).items()
        if blocks.intersection(sent)
    )
