"""Where fetched bytes land for a mount, and from where reads take them.

Lock: one for the index of ranges, held for dictionary operations only. A slab that a reader or the
engine holds is never reused, so views are taken outside of it.
"""

import threading

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.slabs import Slab, SlabPool
from weightstream.cachefs.files.retained import Landed, Retained


class Memory:
    """The memory of one `Content`. Thread-safe, never waits."""

    def __init__(self, slabs: SlabPool) -> None:
        self._slabs = slabs
        self._retained = Retained()
        self._read: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def retained_bytes(self) -> int:
        """Return how much is kept for readers to come."""
        with self._lock:
            return self._retained.bytes_retained

    def unread_bytes(self, blob: Blob) -> int:
        """Return how much of a blob is kept that nobody has read yet."""
        with self._lock:
            return self._retained.unread_bytes(blob)

    def read_bytes(self, blob: Blob) -> int:
        """Return how much of a blob was read from here since anything of it was kept."""
        with self._lock:
            return self._read.get(blob.id, 0)

    def reserve(self, blob: Blob, extent: Extent, chunk_bytes: int, owner: object) -> Slab | None:
        """Return memory for a range; what was kept for readers gives way to what they ask for."""
        while (slab := self._slabs.try_take(len(extent))) is None:
            if not self.drop_one():
                return None
        slab.hold()
        landed = Landed(blob, extent, slab, extent.start, owner)
        with self._lock:
            replaced = self._retained.add(landed, chunk_bytes)
        for older in replaced:
            older.release()
        return slab

    def landed(self, blob: Blob, extent: Extent, chunk_bytes: int, owner: object) -> None:
        """Hear that bytes of a range are valid in the memory that `owner` reserved for them."""
        with self._lock:
            landed = self._retained.find(blob, extent.start // chunk_bytes)
            if landed is None or landed.owner is not owner:
                return
            if landed.extent.start <= extent.start <= landed.valid_to:
                landed.valid_to = max(landed.valid_to, min(extent.stop, landed.extent.stop))

    def hold(self, blob: Blob, extent: Extent, chunk_bytes: int) -> Landed | None:
        """Return the range that has these bytes of one chunk, held until `release`; None: gone."""
        with self._lock:
            landed = self._retained.find(blob, extent.start // chunk_bytes)
            if landed is None or not landed.has(extent):
                return None
            landed.slab.hold()
            return landed

    def has(self, blob: Blob, extent: Extent, chunk_bytes: int) -> bool:
        """Say whether these bytes of one chunk are here."""
        with self._lock:
            landed = self._retained.find(blob, extent.start // chunk_bytes)
            return landed is not None and landed.has(extent)

    def release(self, landed: Landed, read_bytes: int) -> None:
        """Give a held range back after `read_bytes` of it were read."""
        blob_id = landed.blob.id
        with self._lock:
            done_with = self._retained.was_read(landed, read_bytes)
            self._read[blob_id] = self._read.get(blob_id, 0) + read_bytes
        landed.slab.release()
        if done_with is not None:
            done_with.release()

    def drop_one(self) -> bool:
        """Free the range that is least missed; False when none can be freed now."""
        with self._lock:
            slab = self._retained.drop_one()
        if slab is not None:
            slab.release()
        return slab is not None

    def drop_blob(self, blob: Blob) -> None:
        """Forget everything of a blob; who reads it now reads on."""
        with self._lock:
            slabs = self._retained.drop_blob(blob)
            self._read.pop(blob.id, None)
        for slab in slabs:
            slab.release()

    def drop_all(self) -> None:
        """Free whatever nobody holds."""
        while self.drop_one():
            pass
