"""One blob on disk, as every thread of a process shares it.

Who may change what, see docs/design/0001-store.md: EMPTY -> FILLED belongs to the holder of the
chunk's lock; every other change of state, and the seal, is made under the blob's change lock.
Chunks that this process did not write are hashed before their first use, unless the blob is sealed
and its data file has the stamp it was sealed with.
"""

import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.store.checking import check_many, hash_bytes, hash_extent
from weightstream.cachefs.store.direct import DirectWriter
from weightstream.cachefs.store.files import (
    OpenFile,
    fsync_directory,
    read_fully,
    store_errors,
)
from weightstream.cachefs.store.locks import survive_fork
from weightstream.cachefs.store.opening import CHANGE, CHUNK_LOCKS, LOCK_TIMEOUT_S, BlobFiles
from weightstream.cachefs.store.state import (
    ChunkState,
    count_present,
    indices,
    present_flags,
    suspected,
)
from weightstream.cachefs.store.stats import Counters
from weightstream.cachefs.store.table import MAP_OPTIONS, Entry, Stamp
from weightstream.errors import StoreError, StoreReadOnlyError, UsageError

_PRESENT = (ChunkState.FILLED, ChunkState.DURABLE)
# Rounds of flushing while others keep dropping chunks; what is left stays FILLED until next time.
_PROMOTE_ROUNDS = 5
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
        self._files: BlobFiles | None = files
        self._writer = writer
        self._counters = counters
        self._on_close = on_close
        self._direct: OpenFile | None = None
        self._verified = bytearray(self.n_chunks)
        states = files.table.states()
        # Present already and not covered by a seal: a crash may lie between then and now.
        self._inherited = b"" if self._sealed(files) else present_flags(states)
        # DURABLE is never set before the names are on the disk.
        self._names_synced = ChunkState.DURABLE in states
        self.after_fork_in_child()
        survive_fork(self)

    def after_fork_in_child(self) -> None:
        """Replace the mutexes: another thread of the parent may have held them."""
        self._mutex = threading.Lock()
        self._change_mutex = threading.Lock()
        self._sync_mutex = threading.Lock()

    def _open(self) -> BlobFiles:
        files = self._files
        if files is None:
            raise StoreError(f"{self.blob.uri} was closed in the store")
        return files

    def _open_writable(self) -> BlobFiles:
        files = self._open()
        if not files.writable:
            raise StoreReadOnlyError(f"cannot write {files.data.path}: the store is read-only")
        return files

    # ---- what is there

    @property
    def data_path(self) -> Path:
        """Return where the file's bytes lie."""
        return self._open().data.path

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
        states = self.states()
        total = count_present(states) * self.chunk_size
        if self.n_chunks and states[-1] in _PRESENT:
            total -= self.n_chunks * self.chunk_size - self.blob.size
        return total

    @property
    def complete(self) -> bool:
        """Say whether all is there, durable, and the data file untouched since it was sealed."""
        files = self._open()
        if not self.n_chunks:
            return True
        return self._sealed(files) and count_present(files.table.states()) == self.n_chunks

    def _sealed(self, files: BlobFiles) -> bool:
        seal = files.table.seal
        return seal is not None and seal == Stamp.of(files.data)

    # ---- single flight

    def try_lock(self, i: int) -> bool:
        """Become the one, among all threads and processes, that fetches chunk `i`; never waits."""
        return self._open_writable().locks.try_lock(CHUNK_LOCKS + i)

    def unlock(self, i: int) -> None:
        """Let others fetch chunk `i`, if it is not there by now."""
        self._open().locks.unlock(CHUNK_LOCKS + i)

    # ---- writing

    def write(self, i: int, data: memoryview, digest: bytes, crc64: int) -> None:
        """Keep chunk `i`, whose lock the caller holds. A chunk that is there stays as it is."""
        files = self._open_writable()
        extent = self.chunk(i)
        data = data.cast("B")
        if len(data) != len(extent) or len(digest) != 32:
            raise UsageError(f"{self.blob.uri} {extent}: {len(data)} bytes to write")
        if files.table.state(i) == ChunkState.SUSPECT:
            self._empty(files, i, (ChunkState.SUSPECT,))  # nobody must verify half of each
        if files.table.state(i) != ChunkState.EMPTY:
            return
        with store_errors(f"write {self.blob.uri} {extent} to {files.data.path}"):
            self._writer.write(files.data, self._direct_file(files), data, extent.start)
        # The mutex is also the memory barrier between the hash and the state on weak machines.
        with self._mutex:
            files.table.put(i, Entry(digest, crc64))
        with self._mutex:
            self._verified[i] = 1
            files.table.set_state(i, ChunkState.FILLED)

    def _direct_file(self, files: BlobFiles) -> OpenFile | None:
        with self._mutex:
            if self._direct is None:
                self._direct = self._writer.open(files.data.path)
            return self._direct

    def sync(self) -> None:
        """Make what is FILLED now DURABLE, and seal the blob when all of it is there."""
        files = self._open()
        with self._sync_mutex, store_errors(f"sync {files.data.path}"):
            for _ in range(_PROMOTE_ROUNDS):
                if self._promote(files):
                    break
            if self._all_durable(files) and not self._sealed(files):
                self._seal(files)

    def _promote(self, files: BlobFiles) -> bool:
        """Flush and promote; False when chunks were dropped meanwhile: they may be new ones."""
        drops = files.table.drops
        filled = tuple(indices(files.table.states(), ChunkState.FILLED))
        if not filled:
            return True
        self._flush(files)
        with self._changing(files):
            if files.table.drops != drops:
                return False
            for i in filled:
                files.table.set_state(i, ChunkState.DURABLE)
        return True

    def _flush(self, files: BlobFiles) -> None:
        """Bring bytes, then hashes, then names to the disk; not the states that say so."""
        if not files.writable:
            return  # the table is a private copy and nothing was written
        os.fdatasync(files.data.fileno())
        # Not mmap.flush(): CPython holds the interpreter's lock in msync.
        os.fdatasync(files.locks.file().fileno())
        if not self._names_synced:
            folder = files.data.path.parent
            for directory in (folder, folder.parent, folder.parent.parent):
                fsync_directory(directory)
            self._names_synced = True

    def _all_durable(self, files: BlobFiles) -> bool:
        return files.table.states().count(ChunkState.DURABLE) == self.n_chunks > 0

    def _seal(self, files: BlobFiles) -> None:
        inherited = [i for i in indices(self._inherited, 1) if not self._verified[i]]
        if self._check(files, inherited):
            return
        with self._changing(files):
            if self._all_durable(files):
                files.table.seal = Stamp.of(files.data)
        with self._mutex:
            self._direct = None
        if files.writable:
            os.fsync(files.data.fileno())  # fdatasync may leave the mtime behind
            os.fdatasync(files.locks.file().fileno())
        _log.info("stored %s: %d bytes, sealed", self.blob.uri, self.blob.size)

    # ---- reading

    def read_into(self, i: int, offset: int, into: memoryview) -> bool:
        """Fill `into` from `offset` of chunk `i`; False when the chunk is not there, or wrong.

        A wrong chunk is dropped, counted and can be fetched again.
        """
        files = self._open()
        extent, into = self.chunk(i), into.cast("B")
        if not 0 <= offset <= offset + len(into) <= len(extent):
            raise UsageError(f"{self.blob.uri} {extent}: no {len(into)} bytes at {offset}")
        state = files.table.state(i)
        if state == ChunkState.EMPTY:
            return False
        if self._verified[i] or (state in _PRESENT and self._sealed(files)):
            return self._read(files, i, extent.start + offset, into)
        if len(into) == len(extent):
            return self._read_whole(files, i, into)
        return self._check_chunk(files, i) and self._read(files, i, extent.start + offset, into)

    def _read(self, files: BlobFiles, i: int, start: int, into: memoryview) -> bool:
        try:
            if read_fully(files.data.fileno(), into, start):
                return True
            why = "the file ends before"
        except OSError as error:
            why = str(error.strerror)
        _log.warning("cannot read %s of %s: %s", self.chunk(i), files.data.path, why)
        self.drop(i)
        return False

    def _read_whole(self, files: BlobFiles, i: int, into: memoryview) -> bool:
        """Read a chunk and hash it where it landed: it is in the processor's cache."""
        if not self._read(files, i, self.chunk(i).start, into):
            return False
        entry = files.table.entry(i)
        if entry is not None and hash_bytes(into) == entry.digest:
            self._accept(files, i)
            return True
        return self._check_chunk(files, i) and self._read(files, i, self.chunk(i).start, into)

    def map(self) -> mmap.mmap:
        """Map a complete blob, privately: what the caller writes stays in its own memory."""
        files = self._open()
        if not self.complete or not self.blob.size:
            raise StoreError(f"{self.blob.uri} is not complete in the store")
        size, fd = self.blob.size, files.data.fileno()
        with store_errors(f"map {files.data.path}"):
            return mmap.mmap(fd, size, access=mmap.ACCESS_COPY, **MAP_OPTIONS)

    # ---- doubt

    def verify(
        self, everything: bool = False, progress: Callable[[int], None] | None = None
    ) -> int:
        """Hash what is doubtful, or `everything`, by several threads; return how many were dropped.

        When all of the blob is there and right it is sealed afterwards, and can be mapped.
        `progress` is called from this thread with the bytes of each chunk that was hashed.
        """
        files = self._open()
        todo = list(self._doubtful(files, everything))
        dropped = self._check(files, todo, progress)
        self.sync()
        return dropped

    def _doubtful(self, files: BlobFiles, everything: bool) -> Iterator[int]:
        states = files.table.states()
        trusted = not everything and self._sealed(files)
        for i in indices(suspected(states), ChunkState.SUSPECT):
            known = trusted or (self._verified[i] and not everything)
            if not (known and states[i] in _PRESENT):
                yield i

    def _check(
        self, files: BlobFiles, todo: list[int], progress: Callable[[int], None] | None = None
    ) -> int:
        """Hash these chunks; return how many of them were dropped."""
        dropped = 0
        results = check_many(lambda i: self._check_chunk(files, i), todo)
        for i, good in zip(todo, results, strict=True):
            dropped += not good
            if progress is not None:
                progress(len(self.chunk(i)))
        return dropped

    def _check_chunk(self, files: BlobFiles, i: int) -> bool:
        """Hash one chunk; when it is wrong, once more under the change lock, and drop it."""
        if self._matches(files, i):
            self._accept(files, i)
            return True
        with self._changing(files):
            if files.table.state(i) == ChunkState.EMPTY:
                return False
            if self._matches(files, i):  # it was being written when we looked first
                self._set_good(files, i)
                return True
            self._set_empty(files, i)
        _log.warning("%s: %s does not match its hash: dropped", files.data.path, self.chunk(i))
        self._counters.add(dropped_chunks=1)
        return False

    def _matches(self, files: BlobFiles, i: int) -> bool:
        entry = files.table.entry(i)
        return entry is not None and hash_extent(files.data, self.chunk(i)) == entry.digest

    def _accept(self, files: BlobFiles, i: int) -> None:
        self._verified[i] = 1
        if files.table.state(i) == ChunkState.SUSPECT:
            with self._changing(files):
                self._set_good(files, i)

    def _set_good(self, files: BlobFiles, i: int) -> None:
        self._verified[i] = 1
        if files.table.state(i) == ChunkState.SUSPECT:
            files.table.set_state(i, ChunkState.FILLED)

    def drop(self, i: int) -> None:
        """Forget chunk `i`: it was found wrong or unreadable."""
        files = self._open()
        if self._empty(files, i, (ChunkState.SUSPECT, *_PRESENT)):
            self._counters.add(dropped_chunks=1)

    def _empty(self, files: BlobFiles, i: int, states: tuple[ChunkState, ...]) -> bool:
        """Empty a chunk that is in one of `states`; say whether it was."""
        with self._changing(files):
            if files.table.state(i) not in states:
                return False
            self._set_empty(files, i)
            return True

    def _set_empty(self, files: BlobFiles, i: int) -> None:
        """Empty a chunk under the change lock, the seal first."""
        table = files.table
        if table.seal is not None:
            if not self._sealed(files):  # or the next seal would cover what somebody changed
                table.replace_states(suspected(table.states()))
            table.seal = None
        table.count_drop()
        table.set_state(i, ChunkState.EMPTY)
        self._verified[i] = 0

    @contextmanager
    def _changing(self, files: BlobFiles) -> Iterator[None]:
        """Hold the blob's change lock, against threads and against processes."""
        if not self._change_mutex.acquire(timeout=LOCK_TIMEOUT_S):
            raise StoreError(f"{self.blob.uri} is busy in the store for {LOCK_TIMEOUT_S:g} s")
        try:
            if files.writable:
                with files.locks.hold(CHANGE, LOCK_TIMEOUT_S):
                    yield
            else:
                yield
        finally:
            self._change_mutex.release()

    # ---- life

    @property
    def pinned(self) -> bool:
        """Say whether eviction leaves the blob alone."""
        return self._open().table.pinned

    def touch(self) -> None:
        """Make now the time of the last use."""
        files = self._open()
        if files.writable:
            files.table.touch()

    def close(self) -> None:
        """Give one handle back; with the last one the blob's files and locks go."""
        if self._on_close(self):
            self.shut()

    def shut(self) -> None:
        """Close whatever the number of handles; operations under way keep their files open."""
        self._files = None
        self._direct = None

    def __enter__(self) -> "StoredBlob":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
