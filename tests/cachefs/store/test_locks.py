"""Byte-range locks: exclusive between threads, descriptions and processes; freed with the last."""

import threading
from pathlib import Path

import pytest

from weightstream.cachefs.store.locks import LockFile
from weightstream.errors import StoreError


def test_bytes_are_locked_one_by_one(tmp_path: Path) -> None:
    ours, theirs = (LockFile(tmp_path / "lock", create=True) for _ in range(2))
    assert ours.try_lock(1 << 60)
    assert not theirs.try_lock(1 << 60)
    assert theirs.try_lock((1 << 60) + 1)
    assert theirs.taken_elsewhere(1 << 60)
    assert not ours.taken_elsewhere(1 << 60)


def test_shared_locks_keep_exclusive_ones_out(tmp_path: Path) -> None:
    ours, theirs = (LockFile(tmp_path / "lock", create=True) for _ in range(2))
    assert ours.try_lock(0, shared=True)
    assert theirs.try_lock(0, shared=True)
    theirs.unlock(0)
    assert not theirs.try_lock(0)
    ours.unlock(0)
    assert theirs.try_lock(0)


def test_closing_frees_everything(tmp_path: Path) -> None:
    ours, theirs = (LockFile(tmp_path / "lock", create=True) for _ in range(2))
    assert ours.try_lock(0)
    assert ours.try_lock(1, shared=True)
    ours.close()
    assert theirs.try_lock(0)
    assert theirs.try_lock(1)


def test_waiting_is_bounded(tmp_path: Path) -> None:
    ours, theirs = (LockFile(tmp_path / "lock", create=True) for _ in range(2))
    with ours.hold(0, 1.0):
        with pytest.raises(StoreError, match=r"cannot lock .*: held for over 0\.05 s"):
            theirs.wait(0, 0.05)
        with pytest.raises(StoreError):
            ours.wait(0, 0.05)
    theirs.wait(0, 1.0)


def test_threads_that_share_a_file_exclude_each_other(tmp_path: Path) -> None:
    locks = LockFile(tmp_path / "lock", create=True)
    inside = overlaps = rounds = 0

    def work() -> None:
        nonlocal inside, overlaps, rounds
        for _ in range(50):
            with locks.hold(7, 20.0):
                inside += 1
                overlaps += inside > 1
                rounds += 1
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (overlaps, rounds) == (0, 200)
