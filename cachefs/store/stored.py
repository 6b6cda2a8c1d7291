"""One blob on disk, as every thread of a process shares it.

Chunks that this process did not write are hashed before their first use, unless the blob is sealed
and its data file has the stamp it was sealed with. Who may change which state, see chunks.py.
"""

import logging
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.store.checking import check_many, hash_bytes
from weightstream.cachefs.store.chunks import PRESENT, Chunks
from weightstream.cachefs.store.direct import DirectWriter
from weightstream.cachefs.store.files import OpenFile, read_ahead, read_fully, store_errors
from weightstream.cachefs.store.locks import survive_fork
from weightstream.cachefs.store.opening import CHUNK_LOCKS, BlobFiles
from weightstream.cachefs.store.state import (
    ChunkState,
    count_present,
    present_bytes,
    present_flags,
)
from weightstream.cachefs.store.stats import Counters
from weightstream.cachefs.store.table import MAP_OPTIONS, Entry
from weightstream.errors import StoreError, StoreReadOnlyError, UsageError

_log = logging.getLogger(__name__)


class StoredBlob:
    """A blob of the store. Thread-safe; `Store.open_blob` hands out one per blob and counts."""

    def __init__(
        self,
        files: BlobFiles,
        writer: DirectWriter,
        counters: Counters,
        on_close: Callable[["StoredBlob"], bool],
    ) -> None:
        header = files.table.header
        self.blob: Blob = header.blob
        self.chunk_size = header.chunk_size
        self.n_chunks = header.n_chunks
        self.writable = files.writable
        self.data_path: Path = files.data.path
        self._chunks: Chunks | None = Chunks(files, counters)
        self._writer = writer
        self._counters = counters
        self._on_close = on_close
        self._direct: OpenFile | None = None
        self._mutex = threading.Lock()
        self._sync_mutex = threading.Lock()
        survive_fork(self)

    def after_fork_in_child(self) -> None:
        """Replace the mutexes: another thread of the parent may have held them."""
        self._mutex = threading.Lock()
        self._sync_mutex = threading.Lock()
        if self._chunks is not None:
            self._chunks.renew_mutexes()

    def _open(self) -> Chunks:
        """Return what an operation works on; holding it keeps the files open meanwhile."""
        chunks = self._chunks
        if chunks is None:
            raise StoreError(f"{self.blob.uri} was closed in the store")
        return chunks

    def _open_writable(self) -> Chunks:
        chunks = self._open()
        if not self.writable:
            raise StoreReadOnlyError(f"cannot write {self.data_path}: the store is read-only")
        return chunks

    # ---- what is there

    def chunk(self, i: int) -> Extent:
        """Return the bytes that chunk `i` covers."""
        start = i * self.chunk_size
        return Extent(start, min(start + self.chunk_size, self.blob.size))

    def state(self, i: int) -> ChunkState:
        """Return the state of chunk `i` as all processes see it now."""
        return self._open().table.state(i)

    def states(self) -> bytes:
        """Return a snapshot of all states, one byte per chunk."""
        return self._open().table.states()

    def digest(self, i: int) -> bytes:
        """Return the BLAKE3 of chunk `i`, which must be there."""
        return self._entry(i).digest

    def crc64(self, i: int) -> int:
        """Return the CRC64NVME of chunk `i`, which must be there."""
        return self._entry(i).crc64

    def _entry(self, i: int) -> Entry:
        table = self._open().table
        entry = table.entry(i)
        if entry is None or table.state(i) == ChunkState.EMPTY:
            raise StoreError(f"{self.blob.uri} {self.chunk(i)} is not in the store")
        return entry

    def present_bytes(self) -> int:
        """Return how many bytes may be read."""
        return present_bytes(self.states(), self.chunk_size, self.blob.size)

    def holes(self) -> tuple[Extent, ...]:
        """Return the runs of chunks that are not there or not to be trusted, in file order."""
        holes: list[Extent] = []
        for i, present in enumerate(present_flags(self.states())):
            if present:
                continue
            chunk = self.chunk(i)
            if holes and holes[-1].stop == chunk.start:
                holes[-1] = Extent(holes[-1].start, chunk.stop)
            else:
                holes.append(chunk)
        return tuple(holes)

    @property
    def complete(self) -> bool:
        """Say whether all is there, durable, and the data file untouched since it was sealed."""
        chunks = self._open()
        if not self.n_chunks:
            return True
        return chunks.sealed and count_present(chunks.table.states()) == self.n_chunks

    # ---- single flight

    def try_lock(self, i: int) -> bool:
        """Become the one, among all threads and processes, that fetches chunk `i`; never waits."""
        return self._open_writable().files.locks.try_lock(CHUNK_LOCKS + i)

    def unlock(self, i: int) -> None:
        """Let others fetch chunk `i`, if it is not there by now."""
        self._open().files.locks.unlock(CHUNK_LOCKS + i)

    # ---- writing

    def write(self, i: int, data: memoryview, digest: bytes, crc64: int) -> None:
        """Keep chunk `i`, whose lock the caller holds. A chunk that is there stays as it is."""
        chunks, extent, data = self._open_writable(), self.chunk(i), data.cast("B")
        if len(data) != len(extent) or len(digest) != 32:
            raise UsageError(f"{self.blob.uri} {extent}: {len(data)} bytes to write")
        if chunks.table.state(i) == ChunkState.SUSPECT:
            chunks.empty(i, (ChunkState.SUSPECT,))  # nobody must verify half of each
        if chunks.table.state(i) != ChunkState.EMPTY:
            return
        with store_errors(f"write {self.blob.uri} {extent} to {self.data_path}"):
            self._writer.write(chunks.files.data, self._direct_file(), data, extent.start)
        chunks.fill(i, Entry(digest, crc64))

    def _direct_file(self) -> OpenFile | None:
        with self._mutex:
            if self._direct is None:
                self._direct = self._writer.open(self.data_path)
            return self._direct

    def sync(self) -> None:
        """Make what is FILLED now DURABLE, and seal the blob when all of it is there.

        Chunks that were found at opening and not read since are hashed before they are sealed.
        """
        chunks = self._open()
        with self._sync_mutex, store_errors(f"sync {self.data_path}"):
            chunks.promote()
            if chunks.sealed or not self.n_chunks or not chunks.all_durable:
                return
            if self._check(chunks, chunks.inherited()):
                return
            chunks.seal()
            self._direct = None
        _log.info("stored %s: %d bytes, sealed", self.blob.uri, self.blob.size)

    def drop(self, i: int) -> None:
        """Forget chunk `i`: it was found wrong or unreadable."""
        if self._open().empty(i, (ChunkState.SUSPECT, *PRESENT)):
            self._counters.add(dropped_chunks=1)

    # ---- reading

    def read_into(self, i: int, offset: int, into: memoryview) -> bool:
        """Fill `into` from `offset` of chunk `i`; False when the chunk is not there, or wrong.

        A wrong chunk is dropped, counted and can be fetched again.
        """
        chunks, extent, into = self._open(), self.chunk(i), into.cast("B")
        if not 0 <= offset <= offset + len(into) <= len(extent):
            raise UsageError(f"{self.blob.uri} {extent}: no {len(into)} bytes at {offset}")
        if chunks.table.state(i) == ChunkState.EMPTY:
            return False
        if not chunks.trusted(i):
            if len(into) == len(extent):
                return self._read_whole(chunks, i, into)
            if not chunks.check(i):
                return False
        return self._read(chunks, i, extent.start + offset, into)

    def _read_whole(self, chunks: Chunks, i: int, into: memoryview) -> bool:
        """Read a chunk and hash it where it landed: it is in the processor's cache."""
        start = self.chunk(i).start
        if not self._read(chunks, i, start, into):
            return False
        entry = chunks.table.entry(i)
        if entry is not None and hash_bytes(into) == entry.digest:
            chunks.accept(i)
            return True
        return chunks.check(i) and self._read(chunks, i, start, into)

    def _read(self, chunks: Chunks, i: int, start: int, into: memoryview) -> bool:
        try:
            if read_fully(chunks.files.data.fileno(), into, start):
                return True
            why = "the file ends before"
        except OSError as error:
            why = str(error.strerror)
        _log.warning("cannot read %s of %s: %s", self.chunk(i), self.data_path, why)
        self.drop(i)
        return False

    def open_data(self) -> int:
        """Return a new read-only descriptor of the data file; the caller closes it."""
        self._open()
        with store_errors(f"open {self.data_path}"):
            return os.open(self.data_path, os.O_RDONLY | os.O_CLOEXEC)

    def map(self) -> mmap.mmap:
        """Map a complete blob, privately: what the caller writes stays in its own memory."""
        fd = self._open().files.data.fileno()
        if not self.complete or not self.blob.size:
            raise StoreError(f"{self.blob.uri} is not complete in the store")
        with store_errors(f"map {self.data_path}"):
            read_ahead(fd)
            return mmap.mmap(fd, self.blob.size, access=mmap.ACCESS_COPY, **MAP_OPTIONS)

    def verify(
        self, everything: bool = False, progress: Callable[[int], None] | None = None
    ) -> int:
        """Hash what is doubtful, or `everything`, by several threads; return how many were dropped.

        When all of the blob is there and right it is sealed afterwards, and can be mapped.
        `progress` is called from this thread with the bytes of each chunk that was hashed.
        """
        chunks = self._open()
        dropped = self._check(chunks, chunks.doubtful(everything), progress)
        self.sync()
        return dropped

    def _check(
        self, chunks: Chunks, todo: list[int], progress: Callable[[int], None] | None = None
    ) -> int:
        """Hash these chunks; return how many of them were dropped."""
        dropped = 0
        for i, good in zip(todo, check_many(chunks.check, todo), strict=True):
            dropped += not good
            if progress is not None:
                progress(len(self.chunk(i)))
        return dropped

    # ---- life

    @property
    def pinned(self) -> bool:
        """Say whether eviction leaves the blob alone."""
        return self._open().table.pinned

    def touch(self) -> None:
        """Make now the time of the last use."""
        chunks = self._open()
        if self.writable:
            chunks.table.touch()

    def close(self) -> None:
        """Give one handle back; with the last one the blob's files and locks go."""
        if self._on_close(self):
            self.shut()

    def shut(self) -> None:
        """Close whatever the number of handles; operations under way keep their files open."""
        self._chunks = None
        self._direct = None

    def __enter__(self) -> "StoredBlob":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
