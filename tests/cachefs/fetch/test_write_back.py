"""The write-back where a disk hangs, a caller interrupts or a store goes away."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.cachefs.fetch.sources import BufferLanding, FakeSource, content
from tests.conftest import LogWatch

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch import Engine, Flow, Wanted
from weightstream.cachefs.fetch import flow as flow_module
from weightstream.cachefs.store import Store, StoredBlob, write_back
from weightstream.settings import Settings

CHUNK = 256 << 10
SIZE = 10 * CHUNK + 12345
BLOB = Blob("s3://bucket/model.safetensors", SIZE, "v1")
DATA = content(SIZE)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    settings = Settings(store=tmp_path / "store", chunk_size=CHUNK, store_min_free_bytes=0)
    store = Store.open(settings)
    yield store
    store.close()


@pytest.fixture
def engine(store: Store) -> Iterator[Engine]:
    settings = Settings(
        store=store.path, chunk_size=CHUNK, range_size=CHUNK, store_min_free_bytes=0
    )
    engine = Engine(settings)
    yield engine
    engine.close()


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold every write to the store until the event is set."""
    go, write = threading.Event(), StoredBlob.write

    def wait(self: StoredBlob, i: int, data: memoryview, digest: bytes, crc64: int) -> None:
        go.wait(20)
        write(self, i, data, digest, crc64)

    monkeypatch.setattr(StoredBlob, "write", wait)
    yield go
    go.set()


def loaded(engine: Engine, store: Store | None, blob: Blob = BLOB) -> Flow:
    source = FakeSource({blob: DATA[: blob.size]})
    flow = engine.start([Wanted(blob, BufferLanding(blob), (blob.whole(),))], source, store)
    flow.join()
    return flow


def seconds(what: Callable[[], object]) -> float:
    begun = time.monotonic()
    what()
    return time.monotonic() - begun


def test_a_disk_that_hangs_is_waited_for_once(
    engine: Engine,
    store: Store,
    go: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: LogWatch,
) -> None:
    monkeypatch.setattr(flow_module, "_SETTLE_S", 0.5)
    expect_log("write-back of .* hangs")
    flow = loaded(engine, store)
    assert seconds(flow.settle) >= 0.5
    assert seconds(flow.close) < 0.4


def test_chunks_in_the_readers_memory_are_not_shed(
    engine: Engine, store: Store, go: threading.Event
) -> None:
    """Skipping them would free nothing for the flow that has no memory."""
    with loaded(engine, store):
        assert not engine.write_back.shed()
        go.set()


def test_an_interrupted_settle_leaves_no_chunk_behind(
    engine: Engine, store: Store, go: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: memoryview, target: memoryview) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with loaded(engine, store) as flow:
        monkeypatch.setattr(write_back, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            flow.settle()
        go.set()
    assert engine.write_back.drain(10)
    stored = store.find_blob(BLOB)
    assert stored is not None
    with stored:
        assert SIZE - CHUNK <= stored.present_bytes() < SIZE
        assert all(stored.try_lock(i) for i in range(stored.n_chunks))


def test_little_is_copied_however_far_behind_the_disk_is(
    tmp_path: Path, go: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy comes on top of the model's own memory."""
    settings = Settings(
        store=tmp_path / "store", chunk_size=1 << 20, range_size=1 << 20, store_min_free_bytes=0
    )
    data = content(32 << 20)
    blob = Blob("s3://bucket/model.safetensors", len(data), "v1")
    copied: list[int] = []

    def counting(source: memoryview, target: memoryview) -> None:
        copied.append(len(source))
        write_back_copy(source, target)

    write_back_copy = write_back.copy
    monkeypatch.setattr(write_back, "copy", counting)
    store, engine = Store.open(settings), Engine(settings)
    landing = BufferLanding(blob)
    source = FakeSource({blob: data})
    with engine.start([Wanted(blob, landing, (blob.whole(),))], source, store) as flow:
        flow.join()
        threading.Timer(0.3, go.set).start()
        flow.settle()
    assert sum(copied) == 16 << 20
    assert engine.write_back.drain(10)
    stored = store.find_blob(blob)
    assert stored is not None
    with stored:
        assert 16 << 20 <= stored.present_bytes() < len(data)
    engine.close()
    store.close()


def test_a_store_closed_under_a_flow_frees_everything(
    engine: Engine, store: Store, go: threading.Event, expect_log: LogWatch
) -> None:
    expect_log("going on without the store: .* was closed in the store")
    flow = loaded(engine, store)
    store.close()
    go.set()
    assert seconds(flow.close) < 5
    assert engine.write_back.drain(10)


def test_a_blob_synced_on_the_way_is_sealed_at_the_end(
    engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_back, "_SYNC_EVERY_BYTES", CHUNK)
    loaded(engine, store).close()
    assert engine.write_back.drain(10)
    stored = store.find_blob(BLOB)
    assert stored is not None
    with stored:
        assert stored.complete


def test_without_a_thread_more_those_there_are_must_do(
    engine: Engine, store: Store, go: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if self.name == "weightstream-write-back" and engine.write_back._threads:
            raise RuntimeError("can't start new thread")
        if self.name == "weightstream-fetch" and engine._threads:
            raise RuntimeError("can't start new thread")
        begin(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    flow = loaded(engine, store)
    assert (engine._threads, engine.write_back._threads) == (1, 1)
    go.set()
    flow.close()
    assert engine.write_back.drain(10)


def test_an_idle_engine_keeps_no_memory(engine: Engine, store: Store, go: threading.Event) -> None:
    """Slabs come back from the write-back after the last flow has ended."""
    flow = loaded(engine, store)
    threading.Timer(0.3, go.set).start()
    flow.close()
    assert engine.write_back.drain(10)
    until = time.monotonic() + 5
    while engine.budget.used_bytes and time.monotonic() < until:
        time.sleep(0.01)
    assert engine.budget.used_bytes == 0
