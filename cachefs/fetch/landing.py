"""Where bytes go: a landing hands out memory for ranges and hears when bytes are valid in it."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

from weightstream.cachefs.blob import Blob, Extent


class Priority(IntEnum):
    """Who goes first: a reader that waits, a load that is planned, a fill behind everybody."""

    DEMAND = 0
    PLANNED = 1
    BACKGROUND = 2


class Lease(Protocol):
    """Memory for one range."""

    view: memoryview
    """Exactly the range's length; starts on a page when the range starts on one (O_DIRECT)."""

    def hold(self) -> None:
        """Keep the memory as it is for one more user (the write-back)."""
        ...

    def release(self) -> None:
        """Say that one user is done: once per hold, and once by the engine at the range's end."""
        ...


class Landing(Protocol):
    """Memory for one blob of one flow. Its methods are called from the engine's threads."""

    exposes_memory: bool
    """Callers get this very memory afterwards, so `Flow.settle` must end all use of it."""

    def reserve(self, extent: Extent) -> Lease | None:
        """Return memory for `extent`, or None when there is none now (asked again soon)."""
        ...

    def landed(self, extent: Extent) -> None:
        """Hear that these bytes are valid; in order within a range, in any order between ranges."""
        ...


@runtime_checkable
class HoldsBack(Protocol):
    """A landing that refuses memory while its reader is behind, however much there is."""

    @property
    def holds_back(self) -> bool:
        """Say that the last refusal was for the reader's sake."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a reader wants of one blob: these extents, in this order, into that landing.

    With `whole_chunks` the extents grow to chunk borders, so that everything fetched can be kept.
    """

    blob: Blob
    landing: Landing
    extents: tuple[Extent, ...]
    priority: Priority = Priority.PLANNED
    whole_chunks: bool = False
