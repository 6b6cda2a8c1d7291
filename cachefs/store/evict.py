"""Which blobs go when space is needed: a pure function, so that its tests need no disk.

Least recently used first, whole blobs: a model with holes is as slow to load as one that is not
there. Pinned blobs and those somebody has open stay. When all that may go is not enough, it goes
all the same: the free-space limit protects others on the disk, and every byte helps them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


class Evictable(Protocol):
    """What the policy looks at."""

    @property
    def allocated_bytes(self) -> int:
        """Space that removing it frees."""
        ...

    @property
    def last_used_s(self) -> float:
        """Wall clock of the last use."""
        ...

    @property
    def pinned(self) -> bool:
        """Whether the user wants it kept."""
        ...

    @property
    def in_use(self) -> bool:
        """Whether somebody has it open."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the store may take; `max_bytes` 0 means as much as the free space allows."""

    max_bytes: int
    min_free_bytes: int


@dataclass(frozen=True, slots=True)
class Space:
    """What the store takes and what its disk has left."""

    used_bytes: int
    free_bytes: int


def room_bytes(space: Space, limits: Limits) -> int:
    """Return how much more may be stored; negative when the store is beyond a limit."""
    room = space.free_bytes - limits.min_free_bytes
    if limits.max_bytes:
        room = min(room, limits.max_bytes - space.used_bytes)
    return room


B = TypeVar("B", bound=Evictable)


def choose_victims(
    blobs: Iterable[B], space: Space, limits: Limits, needed_bytes: int = 0
) -> Sequence[B]:
    """Return the blobs to remove, in order, so that `needed_bytes` fit within the limits."""
    missing = needed_bytes - room_bytes(space, limits)
    candidates = [b for b in blobs if not (b.pinned or b.in_use)]
    victims = []
    for blob in sorted(candidates, key=lambda b: b.last_used_s):
        if missing <= 0:
            break
        victims.append(blob)
        missing -= blob.allocated_bytes
    return victims
