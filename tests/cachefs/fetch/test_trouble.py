"""Landings, stores and memory that fail: the reader hears of it, and the engine goes on."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cachefs.fetch.sources import BufferLanding, FakeSource, content
from tests.conftest import LogWatch

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, Flow, Lease, Wanted
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.errors import StoreError, WeightstreamError
from weightstream.settings import Settings

CHUNK = 256 << 10
SIZE = 10 * CHUNK + 12345
BLOB = Blob("s3://bucket/model.safetensors", SIZE, "v1")
DATA = content(SIZE)
SOON_S = 10.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=tmp_path / "store", chunk_size=CHUNK, range_size=CHUNK, store_min_free_bytes=0
    )


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    store = Store.open(settings)
    yield store
    store.close()


@pytest.fixture
def engine(settings: Settings, store: Store) -> Iterator[Engine]:
    engine = Engine(settings)
    yield engine
    engine.close()


def start(engine: Engine, landing: BufferLanding, store: Store | None = None) -> Flow:
    source = FakeSource({BLOB: DATA})
    return engine.start([Wanted(BLOB, landing, (BLOB.whole(),))], source, store)


def assert_still_works(engine: Engine) -> None:
    landing = BufferLanding(BLOB)
    with start(engine, landing) as flow:
        flow.wait(BLOB, BLOB.whole(), SOON_S)
    assert landing.data == DATA


def close_soon(flow: Flow) -> bool:
    closing = threading.Thread(target=flow.close, daemon=True)
    closing.start()
    closing.join(SOON_S)
    return not closing.is_alive()


class Unlendable(BufferLanding):
    def reserve(self, extent: Extent) -> Lease | None:
        raise MemoryError("no pages")


class _Unreturnable:
    def __init__(self, view: memoryview) -> None:
        self.view = view

    def hold(self) -> None: ...

    def release(self) -> None:
        raise ZeroDivisionError("bug")


class UnreturnableLanding(BufferLanding):
    def reserve(self, extent: Extent) -> Lease | None:
        return _Unreturnable(memoryview(self.memory)[extent.start : extent.stop])


@pytest.mark.parametrize("kind", [Unlendable, UnreturnableLanding])
def test_a_landing_that_fails_costs_one_flow(
    engine: Engine, expect_log: LogWatch, kind: type[BufferLanding]
) -> None:
    expect_log("unexpected, at s3://bucket/model.safetensors bytes")
    flow = start(engine, kind(BLOB))
    with pytest.raises(WeightstreamError, match=r"no pages|bug"):
        flow._wait_until(lambda: False, SOON_S)  # not `join`: its bytes may all be there
    assert close_soon(flow)
    assert_still_works(engine)


def fail(self: object, *_: object) -> bool:
    raise StoreError("no locks available")


@pytest.mark.parametrize("method", ["try_lock", "state"])
def test_a_store_that_cannot_be_asked_is_done_without(
    engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(StoredBlob, method, fail)
    landing = BufferLanding(BLOB)
    with start(engine, landing, store) as flow:
        flow.wait(BLOB, BLOB.whole(), SOON_S)
    assert landing.data == DATA


def test_a_store_that_cannot_be_read_is_done_without(
    engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch, expect_log: LogWatch
) -> None:
    with start(engine, BufferLanding(BLOB), store) as flow:
        flow.join()
    assert engine.write_back.drain(SOON_S)
    expect_log("going on without the store: no locks available")
    monkeypatch.setattr(StoredBlob, "read_into", fail)
    landing = BufferLanding(BLOB)
    with start(engine, landing, store) as flow:
        flow.wait(BLOB, BLOB.whole(), SOON_S)
    assert landing.data == DATA


def test_a_store_that_cannot_be_searched_is_done_without(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch, expect_log: LogWatch
) -> None:
    expect_log("going on without the store: no locks available")
    monkeypatch.setattr(Store, "find_blob", fail)
    landing = BufferLanding(BLOB)
    off = Engine(settings.model_copy(update={"write_back": "off"}))
    with start(off, landing, store) as flow:
        flow.join()
    assert landing.data == DATA
