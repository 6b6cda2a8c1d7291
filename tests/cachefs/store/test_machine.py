"""Two openings of one store do anything in any order; a small model says what may be seen.

Locks, states and tables are per open file description, so two `Store` objects in one process are to
each other what two processes are.
"""

import logging
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.cachefs.store.blobs import (
    CHUNK,
    content_of,
    flip,
    make_blob,
    open_store,
    piece_of,
    put,
    read_chunk,
)
from tests.cachefs.store.test_reboot import reboot

from weightstream.cachefs.store import ChunkState, Store, StoredBlob

log = logging.getLogger("weightstream.cachefs.store")
BLOB = make_blob(chunks=3)
sides = st.integers(0, 1)
chunks = st.integers(0, 3)


class TwoProcesses(RuleBasedStateMachine):
    """Side 0 and side 1, each with the blob open or not."""

    def __init__(self) -> None:
        super().__init__()
        log.setLevel(logging.CRITICAL)  # damage is found all the time
        self.root = Path(tempfile.mkdtemp())
        self.stores: list[Store] = [open_store(self.root), open_store(self.root)]
        self.open: dict[int, StoredBlob] = {}
        self.locks: dict[int, int] = {}
        self.durable: set[int] = set()
        self.damaged: set[int] = set()
        self.data: Path | None = None

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.root)
        log.setLevel(logging.NOTSET)

    @rule(side=sides)
    def open_blob(self, side: int) -> None:
        if side not in self.open:
            self.open[side] = self.stores[side].open_blob(BLOB)
            self.data = self.open[side].data_path

    @rule(side=sides)
    def close_blob(self, side: int) -> None:
        if side in self.open:
            self.open.pop(side).close()
            self.locks = {i: holder for i, holder in self.locks.items() if holder != side}

    @rule(side=sides, i=chunks)
    def lock(self, side: int, i: int) -> None:
        if side in self.open:
            assert self.open[side].try_lock(i) == (i not in self.locks)
            self.locks.setdefault(i, side)

    @rule(side=sides, i=chunks)
    def unlock(self, side: int, i: int) -> None:
        if side in self.open:
            self.open[side].unlock(i)
            if self.locks.get(i) == side:
                del self.locks[i]

    @rule(side=sides, wanted=st.sets(chunks, min_size=1))
    def write(self, side: int, wanted: set[int]) -> None:
        if side not in self.open:
            return
        for i in sorted(wanted):
            if self.open[side].try_lock(i):
                if self.open[side].state(i) == ChunkState.EMPTY:
                    self.damaged.discard(i)
                put(self.open[side], i)
                assert self.open[side].state(i) in (ChunkState.FILLED, ChunkState.DURABLE)
                self.open[side].unlock(i)

    @rule()
    def close_both(self) -> None:
        self.close_blob(0)
        self.close_blob(1)

    @rule(side=sides)
    def sync(self, side: int) -> None:
        if side in self.open:
            self.open[side].sync()
            self.remember_durable(side)

    @rule(side=sides, everything=st.booleans())
    def verify(self, side: int, everything: bool) -> None:
        if side in self.open:
            self.open[side].verify(everything)
            self.remember_durable(side)
            states = self.open[side].states()
            assert self.open[side].complete == (states == bytes([ChunkState.DURABLE] * 4))

    def remember_durable(self, side: int) -> None:
        states = self.open[side].states()
        durable = {i for i in range(4) if states[i] == ChunkState.DURABLE}
        self.durable |= durable - self.damaged  # those are dropped as soon as they are hashed

    @rule(side=sides, i=chunks)
    def read(self, side: int, i: int) -> None:
        if side in self.open:
            was = self.open[side].state(i)
            found = read_chunk(self.open[side], i)
            assert found in (None, piece_of(self.open[side], i))
            assert (found is None) == (self.open[side].state(i) == ChunkState.EMPTY)
            assert found is not None or i not in self.durable or was == ChunkState.EMPTY

    @rule(side=sides, i=chunks)
    def drop(self, side: int, i: int) -> None:
        if side in self.open:
            self.open[side].drop(i)
            self.durable.discard(i)

    @precondition(lambda self: not self.open and self.data is not None)
    @rule(at=st.integers(0, BLOB.size - 1))
    def damage(self, at: int) -> None:
        assert self.data is not None
        if self.data.exists():
            flip(self.data, at)
            self.durable.discard(at // CHUNK)
            self.damaged.add(at // CHUNK)

    @precondition(lambda self: not self.open and self.data is not None)
    @rule()
    def restart_the_machine(self) -> None:
        assert self.data is not None
        if self.data.exists():
            reboot(self.data, check=False)

    @rule(side=sides)
    def remove(self, side: int) -> None:
        if self.data is not None and self.stores[side].remove(BLOB.uri):
            assert not self.open
            self.durable.clear()
            self.damaged.clear()

    @rule(side=sides)
    def scrub(self, side: int) -> None:
        report = self.stores[side].scrub()
        assert report.blobs == (self.data is not None and self.data.exists())

    @invariant()
    def both_sides_see_the_same(self) -> None:
        states = {stored.states() for stored in self.open.values()}
        assert len(states) <= 1

    @invariant()
    def what_is_durable_stays(self) -> None:
        for stored in self.open.values():
            assert all(stored.state(i) != ChunkState.EMPTY for i in self.durable)

    @invariant()
    def what_is_complete_is_right(self) -> None:
        for stored in self.open.values():
            assert not stored.complete or stored.map()[:] == content_of(BLOB)


TestTwoProcesses = TwoProcesses.TestCase
TestTwoProcesses.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
