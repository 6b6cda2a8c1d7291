"""Forked children: own locks, own state, and no hold on the parent's locks."""

import time
from pathlib import Path

from tests.cachefs.store.blobs import make_blob, open_store
from tests.kit.processes import run_python, start_python

SETUP = """
import os, sys, time
from pathlib import Path
from tests.cachefs.store.blobs import *

def forked(work):
    '''Run work() in a forked child and return what it returned, as an exit status.'''
    pid = os.fork()
    if not pid:
        try:
            os._exit(int(work()))
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

root = Path(sys.argv[1])
store = open_store(root)
stored = store.open_blob(make_blob())
"""

CHILD_USES_THE_STORE = (
    SETUP
    + """
put(stored, 0)
assert stored.try_lock(1)

def work():
    assert not stored.try_lock(1), "the parent's lock"
    stored.unlock(1)
    assert not stored.try_lock(1), "still the parent's lock"
    assert stored.try_lock(2)
    put(stored, 2)
    assert read_chunk(stored, 0) == piece_of(stored, 0)
    stored.sync()
    with store.open_blob(make_blob(name="b")) as other:
        fill(other)
        assert other.complete
    stored.close()
    return 7

emit(forked(work))
emit([stored.state(i).name for i in range(5)])
emit([stored.try_lock(i) for i in (1, 2)])
"""
)

FORK_WITH_MUTEXES_HELD = (
    SETUP
    + """
files = stored._open().files
with store._mutex, stored._mutex, stored._sync_mutex, stored._open()._change_mutex:
    with files.locks._mutex, store._counters._mutex, store._writer._mutex:
        def work():
            fill(stored)
            stored.drop(1)
            store.open_blob(make_blob(name="b")).close()
            return store.stats().dropped_chunks
        emit(forked(work))
"""
)

CHILD_OUTLIVES_PARENT = (
    SETUP
    + """
emit([stored.try_lock(1), stored.try_lock(2)])
if not os.fork():
    time.sleep(60)
time.sleep(60)
"""
)

CHILD_OF_AN_EVICTED_BLOB = (
    SETUP
    + """
put(stored, 0)
ready, forked_end = os.pipe()
read, write = os.pipe()
pid = os.fork()
if not pid:
    os.write(forked_end, b"x")
    os.read(read, 1)
    from weightstream.errors import StoreError
    try:
        stored.try_lock(1)
    except StoreError as error:
        os._exit(0 if "removed from the store" in str(error) or "No such file" in str(error) else 2)
    os._exit(1)
os.read(ready, 1)
stored.close()
removed = len(store.remove(""))
store.open_blob(make_blob())
os.write(write, b"x")
emit([removed, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])])
"""
)


def test_a_child_has_locks_of_its_own(tmp_path: Path) -> None:
    outcome = run_python(CHILD_USES_THE_STORE, tmp_path)
    assert outcome.values == (
        7,
        ["DURABLE", "EMPTY", "DURABLE", "EMPTY", "EMPTY"],
        [False, True],
    ), outcome.stderr


def test_a_fork_while_every_mutex_is_held_leaves_a_usable_child(tmp_path: Path) -> None:
    outcome = run_python(FORK_WITH_MUTEXES_HELD, tmp_path, timeout_s=30)
    assert outcome.value == 1, outcome.stderr


def test_a_child_does_not_keep_the_locks_of_a_dead_parent(tmp_path: Path) -> None:
    with (
        open_store(tmp_path) as store,
        store.open_blob(make_blob()) as stored,
        start_python(CHILD_OUTLIVES_PARENT, tmp_path) as child,
    ):
        child.wait_for(lambda: child.values() == ([True, True],))
        assert not stored.try_lock(1)
        child.process.kill()  # the parent alone: its child sleeps on
        child.process.wait()
        until_s = time.monotonic() + 10.0
        while not stored.try_lock(1):  # the child may not yet have got to letting go of it
            assert time.monotonic() < until_s, "the child keeps its parent's lock"
            time.sleep(0.01)
        child.kill()


def test_a_child_notices_that_its_blob_was_evicted(tmp_path: Path) -> None:
    outcome = run_python(CHILD_OF_AN_EVICTED_BLOB, tmp_path)
    assert outcome.value == [1, 0], outcome.stderr
