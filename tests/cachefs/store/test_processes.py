"""Many processes, and their deaths: kill -9 leaves nothing wrong and nothing locked."""

import time
from pathlib import Path

import pytest
from tests.cachefs.store.blobs import (
    content_of,
    fill,
    make_blob,
    open_store,
    piece_of,
    read_chunk,
    table_of,
)
from tests.kit.processes import Child, start_python

from weightstream.cachefs.store import ChunkState

CHUNKS = 40

SETUP = """
import sys, time
from pathlib import Path
from tests.cachefs.store.blobs import *
root = Path(sys.argv[1])
store = open_store(root)
stored = store.open_blob(make_blob(chunks=40))
"""

WRITE_FOR_EVER = (
    SETUP
    + """
emit("begin")
while True:
    for i in range(stored.n_chunks):
        put(stored, i)
        if i % 3 == 0:
            stored.sync()
            emit([i for i, state in enumerate(stored.states()) if state == 2])
    time.sleep(0.02)
    for i in range(stored.n_chunks):
        stored.drop(i)
    emit([])
"""
)

LOCK = (
    SETUP
    + """
emit(stored.try_lock(3))
time.sleep(60)
"""
)

# Each chunk is claimed, written and logged by exactly one of the processes.
SHARE = (
    SETUP
    + """
written = []
deadline = time.monotonic() + 30
while stored.present_bytes() < stored.blob.size and time.monotonic() < deadline:
    for i in range(stored.n_chunks):
        if stored.state(i) == 0 and stored.try_lock(i):
            if stored.state(i) == 0:
                put(stored, i)
                written.append(i)
            stored.unlock(i)
stored.sync()
emit([written, stored.complete, stored.map()[:] == content_of(stored.blob)])
"""
)

CREATE = """
import sys
from pathlib import Path
from tests.cachefs.store.blobs import *
with open_store(Path(sys.argv[1])) as store:
    for n in range(20):
        with store.open_blob(make_blob(name=f"n{n}")) as stored:
            if stored.try_lock(0):
                put(stored, 0)
            emit(stored._open().files.data.fileno() >= 0)
"""

# Every process makes, fills, checks and evicts the same few blobs.
CHURN = """
import sys, random, time
from pathlib import Path
from tests.cachefs.store.blobs import *
chance = random.Random(int(sys.argv[2]))
until = time.monotonic() + 3
rounds = removed = 0
with open_store(Path(sys.argv[1])) as store:
    while time.monotonic() < until:
        blob = make_blob(chunks=1, name=f"n{chance.randrange(3)}")
        if chance.random() < 0.4:
            removed += len(store.remove(blob.uri))
            continue
        with store.open_blob(blob) as stored:
            for i in range(stored.n_chunks):
                if stored.state(i) == 0 and stored.try_lock(i):
                    put(stored, i)
                    stored.unlock(i)
            stored.sync()
            for i in range(stored.n_chunks):
                found = read_chunk(stored, i)
                assert found in (None, piece_of(stored, i)), i
            assert not stored.complete or stored.map()[:] == content_of(blob)
            assert table_of(stored.data_path).stat().st_ino  # nobody unlinks what is in use
        rounds += 1
emit([rounds, removed])
"""


def close_all(children: list[Child]) -> None:
    for child in children:
        child.__exit__(None, None, None)


@pytest.mark.parametrize("delay_s", [0.0, 0.003, 0.02, 0.05, 0.09])
def test_kill_9_loses_nothing_durable_and_serves_nothing_wrong(
    tmp_path: Path, delay_s: float
) -> None:
    with start_python(WRITE_FOR_EVER, tmp_path) as child:
        child.wait_for(lambda: len(child.values()) > 3)
        time.sleep(delay_s)
        child.kill()
        before_last, last = child.values()[-2:]
    kept = set(last) & set(before_last) if last else set()
    with open_store(tmp_path) as store, store.open_blob(make_blob(chunks=CHUNKS)) as stored:
        found = stored.states()
        # unless it was about to drop them all, what it knew as durable is durable
        if stored._open().table.drops == 0:
            assert {i for i, state in enumerate(found) if state == ChunkState.DURABLE} >= kept
        for i in range(stored.n_chunks):
            expected = piece_of(stored, i) if found[i] else None
            assert read_chunk(stored, i) == expected
            assert stored.try_lock(i)
            stored.unlock(i)
        fill(stored)
        assert stored.map()[:] == content_of(stored.blob)


def test_a_lock_is_free_as_soon_as_its_holder_is_dead(tmp_path: Path) -> None:
    with (
        open_store(tmp_path) as store,
        store.open_blob(make_blob(chunks=CHUNKS)) as stored,
        start_python(LOCK, tmp_path) as child,
    ):
        child.wait_for(lambda: child.values() == (True,))
        assert not stored.try_lock(3)
        child.kill()
        assert stored.try_lock(3)


def test_processes_share_a_blob_and_each_chunk_is_written_once(tmp_path: Path) -> None:
    children = [start_python(SHARE, tmp_path) for _ in range(3)]
    outcomes = [child.result().value for child in children]
    close_all(children)
    assert sorted(i for written, *_ in outcomes for i in written) == list(range(CHUNKS + 1))
    assert [rest for _, *rest in outcomes] == [[True, True]] * 3


def test_many_processes_make_the_same_blobs_at_once(tmp_path: Path) -> None:
    children = [start_python(CREATE, tmp_path) for _ in range(4)]
    assert [child.result().values for child in children] == [(True,) * 20] * 4
    close_all(children)
    with open_store(tmp_path) as store:
        assert len(list(store.blobs())) == 20
        for n in range(20):
            with store.open_blob(make_blob(name=f"n{n}")) as stored:
                assert read_chunk(stored, 0) == piece_of(stored, 0)


def test_eviction_and_use_race_without_harm(tmp_path: Path) -> None:
    children = [start_python(CHURN, tmp_path, seed) for seed in range(3)]
    outcomes = [child.result().value for child in children]
    close_all(children)
    assert all(rounds > 3 for rounds, _ in outcomes)
    assert sum(removed for _, removed in outcomes) > 3
    with open_store(tmp_path) as store:
        store.remove("")
        assert store.usage_bytes() == 0
        assert list(store._layout.files()) == []


def test_a_crash_between_the_two_unlinks_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with store.open_blob(make_blob()) as stored:
            fill(stored)
        table_of(stored.data_path).unlink()
        with store.open_blob(make_blob()) as stored:
            assert stored.states() == bytes(5)
            assert stored.data_path.stat().st_blocks == 0
