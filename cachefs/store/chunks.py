"""The changes of a blob's chunk states, and the lock under which they are made.

EMPTY -> FILLED is made by the holder of the chunk's lock alone. Every other change, and the seal,
goes through here, under the blob's change lock: promoting what was flushed, emptying what is wrong,
believing what was SUSPECT. The lock is held for a few stores to memory, or for the hash of one
chunk that is about to be dropped; never across a flush.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.store.checking import hash_extent
from weightstream.cachefs.store.files import fsync_directory
from weightstream.cachefs.store.opening import CHANGE, LOCK_TIMEOUT_S, BlobFiles
from weightstream.cachefs.store.state import ChunkState, indices, present_flags, suspected
from weightstream.cachefs.store.stats import Counters
from weightstream.cachefs.store.table import Entry, Stamp
from weightstream.errors import StoreError

PRESENT = (ChunkState.FILLED, ChunkState.DURABLE)
# Rounds of flushing while others keep dropping chunks; what is left stays FILLED until next time.
_PROMOTE_ROUNDS = 5
_log = logging.getLogger(__name__)


class Chunks:
    """The chunks of one open blob, as this process trusts them. Thread-safe."""

    def __init__(self, files: BlobFiles, counters: Counters) -> None:
        self.files = files
        self.table = files.table
        self._counters = counters
        header = files.table.header
        self.blob, self.size, self.n_chunks = header.blob, header.chunk_size, header.n_chunks
        self.verified = bytearray(self.n_chunks)
        """1 where this process wrote the chunk or saw that it matches its hash."""
        states = self.table.states()
        # Present already and not covered by a seal: a crash may lie between then and now.
        self._inherited = b"" if self.sealed else present_flags(states)
        # DURABLE is never set before the names are on the disk.
        self._names_synced = ChunkState.DURABLE in states
        self.renew_mutexes()

    def renew_mutexes(self) -> None:
        """Make new mutexes: after a fork, a thread of the parent may hold the old ones."""
        self._mutex = threading.Lock()
        self._change_mutex = threading.Lock()

    def extent(self, i: int) -> Extent:
        """Return the bytes that chunk `i` covers."""
        start = i * self.size
        return Extent(start, min(start + self.size, self.blob.size))

    @property
    def sealed(self) -> bool:
        """Say whether the data file is as it was when all of it had been found good."""
        seal = self.table.seal
        return seal is not None and seal == Stamp.of(self.files.data)

    @property
    def all_durable(self) -> bool:
        """Say whether no chunk can be lost in a crash."""
        return self.table.states().count(ChunkState.DURABLE) == self.n_chunks

    def trusted(self, i: int) -> bool:
        """Say whether chunk `i` may be used without being hashed."""
        return self.table.state(i) in PRESENT and (bool(self.verified[i]) or self.sealed)

    def inherited(self) -> list[int]:
        """Return the chunks found at opening that nobody hashed since."""
        return [i for i in indices(self._inherited, 1) if not self.verified[i]]

    def doubtful(self, everything: bool) -> list[int]:
        """Return the chunks to hash before all may be trusted, or all chunks that are there."""
        states = self.table.states()
        there = indices(suspected(states), ChunkState.SUSPECT)
        if everything:
            return list(there)
        sealed = self.sealed
        return [i for i in there if states[i] not in PRESENT or not (sealed or self.verified[i])]

    # ---- single changes

    def fill(self, i: int, entry: Entry) -> None:
        """EMPTY -> FILLED, by the holder of the chunk's lock, after the bytes were written."""
        # The mutex is also the memory barrier between the hash and the state on weak machines.
        with self._mutex:
            self.table.put(i, entry)
        with self._mutex:
            self.verified[i] = 1
            self.table.set_state(i, ChunkState.FILLED)

    def empty(self, i: int, states: tuple[ChunkState, ...]) -> bool:
        """Forget chunk `i` if it is in one of `states`; say whether it was."""
        with self._changing():
            if self.table.state(i) not in states:
                return False
            self._set_empty(i)
            return True

    def accept(self, i: int) -> None:
        """Trust chunk `i`, which was seen to match its hash."""
        self.verified[i] = 1
        if self.table.state(i) == ChunkState.SUSPECT:
            with self._changing():
                self._set_good(i)

    def check(self, i: int) -> bool:
        """Hash chunk `i`; when it is wrong, once more under the change lock, and drop it."""
        if self._matches(i):
            self.accept(i)
            return True
        with self._changing():
            if self.table.state(i) == ChunkState.EMPTY:
                return False
            if self._matches(i):  # it was being written when we looked first
                self._set_good(i)
                return True
            self._set_empty(i)
        path = self.files.data.path
        _log.warning("%s: %s does not match its hash: dropped", path, self.extent(i))
        self._counters.add(dropped_chunks=1)
        return False

    def _matches(self, i: int) -> bool:
        entry = self.table.entry(i)
        return entry is not None and hash_extent(self.files.data, self.extent(i)) == entry.digest

    def _set_good(self, i: int) -> None:
        self.verified[i] = 1
        if self.table.state(i) == ChunkState.SUSPECT:
            self.table.set_state(i, ChunkState.FILLED)

    def _set_empty(self, i: int) -> None:
        """Empty a chunk under the change lock, the seal first."""
        if self.table.seal is not None:
            if not self.sealed:  # or the next seal would cover what somebody changed
                self.table.replace_states(suspected(self.table.states()))
            self.table.seal = None
        self.table.count_drop()
        self.table.set_state(i, ChunkState.EMPTY)
        self.verified[i] = 0

    # ---- durability

    def promote(self) -> None:
        """FILLED -> DURABLE, for what is FILLED now, once it is on the disk."""
        for _ in range(_PROMOTE_ROUNDS):
            drops = self.table.drops
            filled = tuple(indices(self.table.states(), ChunkState.FILLED))
            if not filled:
                return
            self._flush()
            with self._changing():
                # A chunk dropped meanwhile may be there again, with bytes that were not flushed.
                if self.table.drops == drops:
                    for i in filled:
                        self.table.set_state(i, ChunkState.DURABLE)
                    return

    def _flush(self) -> None:
        """Bring bytes, then hashes, then names to the disk; not the states that say so."""
        if not self.files.writable:
            return  # the table is a private copy, and nothing was written
        os.fdatasync(self.files.data.fileno())
        self._flush_table()
        if not self._names_synced:
            folder = self.files.data.path.parent
            for directory in (folder, folder.parent, folder.parent.parent):
                fsync_directory(directory)
            self._names_synced = True

    def _flush_table(self) -> None:
        # Not mmap.flush(): CPython holds the interpreter's lock during msync.
        os.fdatasync(self.files.locks.file().fileno())

    def seal(self) -> None:
        """Record the data file's stamp, if all chunks are DURABLE; the caller has no doubts."""
        with self._changing():
            if self.all_durable:
                self.table.seal = Stamp.of(self.files.data)
        if self.files.writable:
            os.fsync(self.files.data.fileno())  # fdatasync may leave the mtime behind
            self._flush_table()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the blob's change lock, against threads and against processes."""
        if not self._change_mutex.acquire(timeout=LOCK_TIMEOUT_S):
            raise StoreError(f"{self.blob.uri} is busy in the store for {LOCK_TIMEOUT_S:g} s")
        try:
            if self.files.writable:
                with self.files.locks.hold(CHANGE, LOCK_TIMEOUT_S):
                    yield
            else:
                yield
        finally:
            self._change_mutex.release()
