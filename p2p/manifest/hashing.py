"""Hash what lands, on the threads that fetch it, while it is in the processor's cache.

A landing for the engine that keeps no bytes: it hands out slabs, and of what arrives in them it
keeps the BLAKE3 and the CRC64NVME of each chunk and, for a torrent, the roots of its SHA-256
subtrees. BLAKE3 takes 0.15 s/GB a core, the SHA-256 of the torrent 0.8.
"""

import threading
from dataclasses import dataclass, field

from awscrt import checksums
from blake3 import blake3

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Lease, SlabPool
from weightstream.errors import StoreError
from weightstream.p2p.manifest.manifest import DIGEST_BYTES, chunk_count
from weightstream.p2p.manifest.torrent import (
    HASH_BYTES,
    LEAF_BYTES,
    leaves_of,
    subtree,
    unit_bytes,
)


@dataclass(slots=True)
class _Range:
    """A reserved range: its memory, and how far it was hashed. One thread at a time uses it."""

    extent: Extent
    view: memoryview
    position: int
    digest: blake3
    crc64nvme: int = 0
    leaves: list[bytes] = field(default_factory=list)


class HashingLanding:
    """The hashes of one blob, chunk by chunk."""

    exposes_memory = False

    def __init__(self, blob: Blob, chunk_size: int, slabs: SlabPool, *, torrent: bool) -> None:
        """`torrent` wants the SHA-256 subtrees; the chunk size is a multiple of 16 KiB then."""
        self.blob = blob
        self.chunk_size = chunk_size
        self._slabs = slabs
        self._torrent = torrent
        self._unit = unit_bytes(chunk_size) if torrent else chunk_size
        chunks = chunk_count(blob.size, chunk_size)
        self._digests = bytearray(chunks * DIGEST_BYTES)
        self._crcs = [0] * chunks
        self._units = bytearray(chunk_count(blob.size, self._unit) * HASH_BYTES if torrent else 0)
        # Ranges are reserved and land on many threads; each range has one key at a time: the
        # offset at which its next bytes arrive.
        self._ranges: dict[int, _Range] = {}
        self._lock = threading.Lock()

    # ---- the engine's

    def reserve(self, extent: Extent) -> Lease | None:
        """Return a slab when the budget has room."""
        if not self._is_whole(extent):
            raise StoreError(
                f"{self.blob.uri}: the store began to keep it in other chunks meanwhile; try again"
            )
        slab = self._slabs.try_take(len(extent))
        if slab is not None:
            with self._lock:
                reserved = _Range(extent, slab.view, extent.start, blake3())
                self._ranges[extent.start] = reserved
        return slab

    def _is_whole(self, extent: Extent) -> bool:
        stop = extent.stop
        ends = stop % self.chunk_size == 0 or stop == self.blob.size
        return ends and extent.start % self.chunk_size == 0

    def landed(self, extent: Extent) -> None:
        """Hash what arrived, but for a started leaf."""
        with self._lock:
            reserved = self._ranges.pop(extent.start)
        self._hash(reserved, extent.stop)
        if extent.stop < reserved.extent.stop:
            with self._lock:
                self._ranges[extent.stop] = reserved

    # ---- hashing

    def _hash(self, reserved: _Range, stop: int) -> None:
        while reserved.position < stop:
            begin = reserved.position
            border = (begin // self._unit + 1) * self._unit
            end = min(border, self.blob.size, stop)
            if end == stop and end not in (border, self.blob.size):
                end -= end % LEAF_BYTES
                if end <= begin:
                    return
            offset = reserved.extent.start
            self._step(reserved, Extent(begin, end), reserved.view[begin - offset : end - offset])

    def _step(self, reserved: _Range, extent: Extent, data: memoryview) -> None:
        """Take in bytes of one unit; note what ends with them."""
        reserved.digest.update(data)
        reserved.crc64nvme = checksums.crc64nvme(data, reserved.crc64nvme)
        at_end = extent.stop == self.blob.size
        if self._torrent:
            reserved.leaves += leaves_of(data)
            if at_end or extent.stop % self._unit == 0:
                self._end_unit(extent.start // self._unit, reserved)
        if at_end or extent.stop % self.chunk_size == 0:
            self._end_chunk(extent.start // self.chunk_size, reserved)
        reserved.position = extent.stop

    def _end_unit(self, unit: int, reserved: _Range) -> None:
        root = subtree(reserved.leaves, self._unit, self.blob.size)
        self._units[unit * HASH_BYTES : (unit + 1) * HASH_BYTES] = root
        reserved.leaves = []

    def _end_chunk(self, chunk: int, reserved: _Range) -> None:
        at = chunk * DIGEST_BYTES
        self._digests[at : at + DIGEST_BYTES] = reserved.digest.digest()
        self._crcs[chunk] = reserved.crc64nvme
        reserved.digest, reserved.crc64nvme = blake3(), 0

    # ---- what came out, once everything has landed

    @property
    def digests(self) -> bytes:
        """Return the BLAKE3 of every chunk, one after the other."""
        return bytes(self._digests)

    @property
    def crc64nvme(self) -> int:
        """Return the CRC64NVME of the whole file."""
        total = 0
        for i, crc in enumerate(self._crcs):
            length = min(self.chunk_size, self.blob.size - i * self.chunk_size)
            total = checksums.combine_crc64nvme(total, crc, length)
        return total

    @property
    def units(self) -> list[bytes]:
        """Return the root of every unit's subtree, in file order; see torrent.py."""
        units = bytes(self._units)
        return [units[at : at + HASH_BYTES] for at in range(0, len(units), HASH_BYTES)]
