"""Bytes that have landed and may be read again soon: the engine's slabs, kept a little longer.

A read is answered from the memory in which its bytes arrived, without a detour over the disk. The
slabs stay charged to the engine's budget, and any of them may go at any time: what is dropped here
is in the store, or is fetched again. A range goes when it was read to its end, or when memory is
wanted, the oldest first.

Not thread-safe by itself: the caller's lock guards every call (`Content` has one for all its
memory; each call is a few dictionary operations).
"""

from collections import OrderedDict
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.slabs import Slab


@dataclass(slots=True, eq=False)
class Landed:
    """A range of a blob in memory; its bytes are valid from its start to `valid_to`.

    `owner` is who brings them. Two may bring the same chunk at once, each into memory of its own:
    what one of them has says nothing of the other's.
    """

    blob: Blob
    extent: Extent
    slab: Slab
    valid_to: int
    owner: object
    read_bytes: int = 0

    def has(self, extent: Extent) -> bool:
        """Say whether these bytes are here and valid."""
        return self.extent.start <= extent.start and extent.stop <= self.valid_to

    def view(self, extent: Extent) -> memoryview:
        """Return the bytes; the caller holds the slab while it looks at them."""
        begin = extent.start - self.extent.start
        return self.slab.view[begin : begin + len(extent)]


class Retained:
    """The ranges in memory, by blob and chunk."""

    def __init__(self) -> None:
        self._by_chunk: dict[tuple[str, int], Landed] = {}
        self._oldest_first: OrderedDict[Landed, None] = OrderedDict()
        self._chunk_bytes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._oldest_first)

    @property
    def bytes_retained(self) -> int:
        """Return how much memory is kept."""
        return sum(len(landed.extent) for landed in self._oldest_first)

    def unread_bytes(self, blob: Blob) -> int:
        """Return how much of a blob lies here that nobody has read yet."""
        mine = (landed for landed in self._oldest_first if landed.blob == blob)
        return sum(one.valid_to - one.extent.start - one.read_bytes for one in mine)

    def add(self, landed: Landed, chunk_bytes: int) -> list[Slab]:
        """Keep a range; return the slabs of ranges that it replaces, for the caller to release."""
        replaced = []
        for key in self._keys(landed, chunk_bytes):
            older = self._by_chunk.get(key)
            if older is not None and older in self._oldest_first:
                replaced.append(self._forget(older, chunk_bytes))
            self._by_chunk[key] = landed
        self._oldest_first[landed] = None
        self._chunk_bytes[landed.blob.id] = chunk_bytes
        return replaced

    def find(self, blob: Blob, chunk: int) -> Landed | None:
        """Return the range that holds a chunk."""
        return self._by_chunk.get((blob.id, chunk))

    def was_read(self, landed: Landed, count: int) -> Slab | None:
        """Count bytes that a reader took; return the slab, for the caller to release, once all are.

        The kernel keeps what it has read, so nobody comes back for it; and a slab that is used
        again costs nothing, where a fresh one costs its page faults (0.4 CPU s/GB and more).
        """
        landed.read_bytes += count
        if landed.read_bytes < len(landed.extent) or landed not in self._oldest_first:
            return None
        return self._forget(landed, self._chunk_bytes[landed.blob.id])

    def drop_one(self) -> Slab | None:
        """Forget the range that is least missed; return its slab for the caller to release.

        Ranges that somebody else still holds (the engine, the write-back, a reader) stay: to forget
        them frees nothing.
        """
        for landed in self._oldest_first:
            if not landed.slab.is_shared:
                return self._forget(landed, self._chunk_bytes[landed.blob.id])
        return None

    def drop_blob(self, blob: Blob) -> list[Slab]:
        """Forget all of a blob; return the slabs for the caller to release."""
        mine = [landed for landed in self._oldest_first if landed.blob == blob]
        return [self._forget(landed, self._chunk_bytes[blob.id]) for landed in mine]

    def _forget(self, landed: Landed, chunk_bytes: int) -> Slab:
        del self._oldest_first[landed]
        for key in self._keys(landed, chunk_bytes):
            if self._by_chunk.get(key) is landed:
                del self._by_chunk[key]
        return landed.slab

    @staticmethod
    def _keys(landed: Landed, chunk_bytes: int) -> list[tuple[str, int]]:
        first, last = landed.extent.start // chunk_bytes, (landed.extent.stop - 1) // chunk_bytes
        return [(landed.blob.id, chunk) for chunk in range(first, last + 1)]
