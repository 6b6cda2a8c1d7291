"""One blob, many threads: writes, reads, syncs, drops and closing at the same time."""

import os
import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.cachefs.store.blobs import content_of, make_blob, open_store, piece_of, put, read_chunk

from weightstream.cachefs.store import ChunkState
from weightstream.errors import StoreError

BLOB = make_blob(chunks=24)


def run_together(*works: Callable[[], None]) -> None:
    """Run all at once; raise the first thing that any of them raised."""
    raised: list[BaseException] = []

    def guard(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guard, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if raised:
        raise raised[0]


def test_threads_fill_read_sync_and_drop_one_blob(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(BLOB) as stored:
        chunks = range(stored.n_chunks)

        def write() -> None:
            for _ in range(4):
                for i in chunks:
                    if stored.try_lock(i):
                        put(stored, i)
                        stored.unlock(i)

        def read() -> None:
            for _ in range(4):
                for i in chunks:
                    assert read_chunk(stored, i) in (None, piece_of(stored, i))

        def sync() -> None:
            for _ in range(10):
                stored.sync()

        def drop() -> None:
            chance = random.Random(1)
            for _ in range(60):
                stored.drop(chance.choice(chunks))

        run_together(write, write, read, read, sync, sync, drop)
        put(stored, *(i for i in chunks if stored.state(i) == ChunkState.EMPTY))
        stored.sync()
        assert stored.complete
        assert stored.map()[:] == content_of(BLOB)


def close_under_a_writer(root: Path, victims: list[Path]) -> None:
    store = open_store(root)
    stored = store.open_blob(BLOB)
    started = threading.Event()

    def write() -> None:
        with suppress(StoreError):  # it was closed
            for i in range(stored.n_chunks):
                put(stored, i)
                started.set()

    def close() -> None:
        started.wait(10)
        store.close()
        # these get the numbers that the store's files had
        files = [os.open(path, os.O_RDWR | os.O_CREAT) for path in victims]
        for file in files:
            os.close(file)

    run_together(write, close)


def test_closing_under_a_writer_never_lets_it_write_elsewhere(tmp_path: Path) -> None:
    victims = [tmp_path / f"victim{n}" for n in range(40)]
    for n in range(8):
        close_under_a_writer(tmp_path / str(n), victims)
    assert {path.stat().st_size for path in victims} == {0}


def test_handles_are_opened_and_closed_from_many_threads(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:

        def work() -> None:
            for _ in range(40):
                with store.open_blob(BLOB) as stored:
                    put(stored, 3)
                    assert read_chunk(stored, 3) == piece_of(stored, 3)

        run_together(*[work] * 4)
        assert [info.in_use for info in store.blobs()] == [False]
