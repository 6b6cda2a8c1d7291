"""One file while somebody reads it: its place in the store, who has it open, what is under way."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.files.order import AccessOrder
from weightstream.cachefs.files.policy import load_has_begun
from weightstream.cachefs.store import ChunkState, StoredBlob
from weightstream.errors import StoreError

if TYPE_CHECKING:
    from weightstream.cachefs.fetch import Flow
    from weightstream.cachefs.files.tree import File

log = logging.getLogger(__name__)


class Held:
    """Made and dropped by `Content`, whose lock guards the counters."""

    def __init__(
        self, file: "File", stored: StoredBlob | None, chunk_bytes: int, order: AccessOrder
    ) -> None:
        self.file = file
        self.blob = file.blob
        self.stored = stored
        self.is_placed = stored is not None
        """A file that is not in the store gets its place there when it is first read."""
        self.chunk_bytes = stored.chunk_size if stored is not None else chunk_bytes
        self.order = order
        self.opens = 0
        self.used_s = time.monotonic()
        self.first_chunk = 0
        self.touched: set[int] = set()
        self.demands: set[int] = set()
        self.flow: Flow | None = None
        """The flow of the fill that runs, if one does."""

    @property
    def n_chunks(self) -> int:
        """Return how many chunks the file has."""
        return -(-self.blob.size // self.chunk_bytes)

    def chunk(self, i: int) -> Extent:
        """Return the bytes of chunk `i`."""
        start = i * self.chunk_bytes
        return Extent(start, min(start + self.chunk_bytes, self.blob.size))

    def chunks_of(self, extent: Extent) -> range:
        """Return the chunks that an extent touches."""
        return range(extent.start // self.chunk_bytes, -(-extent.stop // self.chunk_bytes))

    def parts(self, extent: Extent) -> Iterator[tuple[int, Extent]]:
        """Yield (chunk, part of `extent` in it)."""
        for i in self.chunks_of(extent):
            chunk = self.chunk(i)
            yield i, Extent(max(chunk.start, extent.start), min(chunk.stop, extent.stop))

    def touch(self, extent: Extent) -> bool:
        """Hear of a read; say whether the reads so far look like a load."""
        self.rest()
        for i in self.chunks_of(extent):
            if i not in self.touched:
                if not self.touched:
                    self.first_chunk = i
                self.touched.add(i)
                self.order.touch(self.file.name, i)
        return load_has_begun(self.blob.size, len(self.touched), max(self.touched, default=0))

    def rest(self) -> None:
        """Begin to count as idle now."""
        self.used_s = time.monotonic()

    def is_stored(self, i: int) -> bool:
        """Say whether the store has chunk `i`, as far as can be told without reading it."""
        if self.stored is None:
            return False
        try:
            return self.stored.state(i) is not ChunkState.EMPTY
        except StoreError:
            return False  # closed, or gone: the origin has it

    def read_stored(self, i: int, part: Extent, into: memoryview) -> bool:
        """Fill `into` with verified bytes from the store; False when it has not got them."""
        if self.stored is None:
            return False
        try:
            return self.stored.read_into(i, part.start - i * self.chunk_bytes, into)
        except StoreError as error:
            log.debug("reading %s %s without the store: %s", self.blob.uri, part, error)
            return False

    def close(self) -> None:
        """Give the place in the store back."""
        stored, self.stored = self.stored, None
        if stored is not None:
            stored.close()


class Scratch(threading.local):
    """A buffer per thread, for bytes on their way from the store to a reply."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def take(self, count: int) -> memoryview:
        """Return `count` bytes, valid until this thread asks again."""
        if len(self._buffer) < count:
            self._buffer = bytearray(count)
        return memoryview(self._buffer)[:count]
