"""The unit of planning: a piece is a chunk, or the wanted part of one, of one blob of a flow."""

from bisect import bisect_right
from dataclasses import dataclass, field
from enum import Enum, auto

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.fetch.checks import PieceSums
from weightstream.cachefs.fetch.landing import Priority, Wanted
from weightstream.cachefs.fetch.ranges import cut, grow
from weightstream.cachefs.store import StoredBlob


class Stage(Enum):
    """Where a piece is on its way."""

    PENDING = auto()
    ELSEWHERE = auto()
    """Another flow or process fetches its chunk; it comes from the store when that is done."""
    RUNNING = auto()
    LANDED = auto()


@dataclass(slots=True, eq=False)
class Piece:
    """Mutable, guarded by its flow's lock, but for `landed_to`, which only its job advances."""

    part: "Part"
    extent: Extent
    chunk: int
    whole: bool
    """It covers its chunk, so the chunk can be kept."""
    landed_to: int
    priority: Priority
    stage: Stage = Stage.PENDING
    elsewhere_since: float = 0.0
    alone: bool = False
    """Waited too long for somebody else's fetch: fetch it without the store."""
    locked: bool = False
    sums: PieceSums = field(default_factory=PieceSums)


class Part:
    """One blob of a flow: its pieces, by offset, and its place in the store."""

    def __init__(self, wanted: Wanted, stored: StoredBlob | None, keep: bool, chunk_bytes: int):
        self.blob = wanted.blob
        self.landing = wanted.landing
        self.priority: Priority = wanted.priority
        self.stored = stored
        self.keep = keep and stored is not None
        self.chunk_bytes = chunk_bytes
        self.planned = [self._piece(e) for e in cut(self._extents(wanted), chunk_bytes)]
        self.pieces = sorted(self.planned, key=lambda piece: piece.extent.start)
        self._starts = [piece.extent.start for piece in self.pieces]

    def _extents(self, wanted: Wanted) -> tuple[Extent, ...]:
        if not wanted.whole_chunks:
            return wanted.extents
        size = self.blob.size
        return tuple(grow(e, self.chunk_bytes, size) for e in wanted.extents if len(e))

    def _piece(self, extent: Extent) -> Piece:
        chunk = extent.start // self.chunk_bytes
        border = min((chunk + 1) * self.chunk_bytes, self.blob.size)
        whole = extent == Extent(chunk * self.chunk_bytes, border)
        return Piece(self, extent, chunk, whole, extent.start, self.priority)

    def overlapping(self, extent: Extent) -> list[Piece]:
        """Return the pieces that share bytes with `extent`, by offset."""
        first = max(0, bisect_right(self._starts, extent.start) - 1)
        found = []
        for piece in self.pieces[first:]:
            if piece.extent.start >= extent.stop:
                break
            if piece.extent.stop > extent.start:
                found.append(piece)
        return found

    def has_landed(self, extent: Extent) -> bool:
        """Say whether all wanted bytes of `extent` are valid."""
        return all(
            piece.landed_to >= min(piece.extent.stop, extent.stop)
            for piece in self.overlapping(extent)
        )

    def covers_blob(self) -> bool:
        """Say whether every byte of the blob is wanted."""
        return sum(len(piece.extent) for piece in self.pieces) == self.blob.size
