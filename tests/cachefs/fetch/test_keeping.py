"""The engine and the store: kept by reference, shared, never wrong, never waited for."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cachefs.fetch.sources import BufferLanding, FakeSource, Request, content
from tests.conftest import LogWatch

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, Flow, Lease, Wanted
from weightstream.cachefs.origin import Checksum
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.errors import IntegrityError, StoreFullError
from weightstream.settings import Settings

CHUNK = 256 << 10
SIZE = 10 * CHUNK + 12345
BLOB = Blob("s3://bucket/model.safetensors", SIZE, "v1")
DATA = content(SIZE)


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


def fetch(engine: Engine, store: Store, source: FakeSource, *extents: Extent) -> BufferLanding:
    landing = BufferLanding(BLOB)
    with engine.start([Wanted(BLOB, landing, extents or (BLOB.whole(),))], source, store) as flow:
        flow.join()
        flow.settle()
    assert engine.write_back.drain(20)
    return landing


def stored_bytes(store: Store) -> bytes:
    stored = store.find_blob(BLOB)
    assert stored is not None
    assert stored.complete
    data = bytes(stored.map())
    stored.close()
    return data


def slow_disk(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    write = StoredBlob.write

    def slow(self: StoredBlob, i: int, data: memoryview, digest: bytes, crc64: int) -> None:
        time.sleep(seconds)
        write(self, i, data, digest, crc64)

    monkeypatch.setattr(StoredBlob, "write", slow)


def test_what_was_fetched_is_kept_and_sealed(engine: Engine, store: Store) -> None:
    fetch(engine, store, FakeSource({BLOB: DATA}))
    assert stored_bytes(store) == DATA


def test_the_second_time_nothing_is_fetched(engine: Engine, store: Store) -> None:
    source = FakeSource({BLOB: DATA})
    fetch(engine, store, source)
    assert fetch(engine, store, source).data == DATA
    assert source.sent_bytes == SIZE


def test_write_back_off_keeps_nothing_but_reads_what_is_there(
    settings: Settings, engine: Engine, store: Store
) -> None:
    off = Engine(settings.model_copy(update={"write_back": "off"}))
    source = FakeSource({BLOB: DATA})
    fetch(off, store, source)
    assert store.find_blob(BLOB) is None
    fetch(engine, store, source)
    fetch(off, store, source)
    assert source.sent_bytes == 2 * SIZE


def test_a_closed_flow_leaves_good_chunks_behind(engine: Engine, store: Store) -> None:
    def behave(request: Request, sent: int) -> None:
        if request.extent.start >= 5 * CHUNK:
            request.sleep(30)

    first = FakeSource({BLOB: DATA}, behave)
    landing = BufferLanding(BLOB)
    flow = engine.start([Wanted(BLOB, landing, (BLOB.whole(),))], first, store)
    flow.wait(BLOB, Extent(0, 5 * CHUNK), timeout_s=10)
    flow.close()
    assert engine.write_back.drain(20)
    second = FakeSource({BLOB: DATA})
    assert fetch(engine, store, second).data == DATA
    assert second.sent_bytes <= SIZE - 5 * CHUNK
    assert stored_bytes(store) == DATA


def test_two_flows_at_once_fetch_each_byte_once(engine: Engine, store: Store) -> None:
    source = FakeSource({BLOB: DATA}, lambda request, sent: request.sleep(0.01))
    landings = [BufferLanding(BLOB), BufferLanding(BLOB)]
    flows = [
        engine.start([Wanted(BLOB, landing, (BLOB.whole(),))], source, store)
        for landing in landings
    ]
    for flow in flows:
        flow.join()
        flow.close()
    assert [landing.data for landing in landings] == [DATA, DATA]
    assert source.sent_bytes == SIZE


def test_an_owner_that_hangs_is_waited_for_only_so_long(settings: Settings, store: Store) -> None:
    engine = Engine(settings.model_copy(update={"share_wait_s": 0.5}))
    holder = store.open_blob(BLOB)
    assert holder.try_lock(3)
    source = FakeSource({BLOB: DATA})
    begun = time.monotonic()
    assert fetch(engine, store, source).data == DATA
    assert time.monotonic() - begun < 10
    assert source.sent_bytes == SIZE
    holder.unlock(3)
    holder.close()


def test_memory_may_be_changed_after_settle(
    engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_disk(monkeypatch, 0.05)
    landing = BufferLanding(BLOB)
    wanted = Wanted(BLOB, landing, (BLOB.whole(),))
    with engine.start([wanted], FakeSource({BLOB: DATA}), store) as flow:
        flow.join()
        flow.settle()
        landing.memory[:SIZE] = b"\xff" * SIZE
    assert engine.write_back.drain(20)
    assert stored_bytes(store) == DATA


def test_a_slow_disk_never_slows_the_load(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without memory to keep a copy in, chunks are skipped; what is kept is right."""
    slow_disk(monkeypatch, 0.5)
    engine = Engine(settings.model_copy(update={"memory_budget": 2 << 20}))
    landing = BufferLanding(BLOB)
    begun = time.monotonic()
    wanted = Wanted(BLOB, landing, (BLOB.whole(),))
    with engine.start([wanted], FakeSource({BLOB: DATA}), store) as flow:
        flow.join()
        flow.settle()
        elapsed_s = time.monotonic() - begun
        landing.memory[:SIZE] = b"\xff" * SIZE
    assert elapsed_s < 2.5  # eleven chunks at half a second, four at a time, would be more
    monkeypatch.undo()
    assert engine.write_back.drain(30)
    source = FakeSource({BLOB: DATA})
    assert fetch(Engine(settings), store, source).data == DATA
    assert source.sent_bytes > 0
    assert stored_bytes(store) == DATA


def test_a_full_disk_is_said_once_and_the_load_goes_on(
    engine: Engine,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    expect_log: LogWatch,
) -> None:
    def full(self: StoredBlob, i: int, data: memoryview, digest: bytes, crc64: int) -> None:
        raise StoreFullError("/store: no space left on device")

    monkeypatch.setattr(StoredBlob, "write", full)
    expect_log("going on without the store: /store: no space left")
    assert fetch(engine, store, FakeSource({BLOB: DATA})).data == DATA
    assert len(expect_log.messages("without the store")) == 1


def test_damaged_bytes_are_not_kept(engine: Engine, store: Store) -> None:
    source = FakeSource({BLOB: DATA})
    source.checksums[BLOB] = Checksum("crc64nvme", 1)
    landing = BufferLanding(BLOB)
    flow = engine.start([Wanted(BLOB, landing, (BLOB.whole(),))], source, store)
    with flow, pytest.raises(IntegrityError):
        flow.join()
    assert engine.write_back.drain(20)
    stored = store.find_blob(BLOB)
    assert stored is not None
    assert stored.present_bytes() == 0
    stored.close()


def test_chunks_from_the_store_take_part_in_the_check(engine: Engine, store: Store) -> None:
    from awscrt import checksums

    fetch(engine, store, FakeSource({BLOB: DATA}), Extent(0, 4 * CHUNK))
    source = FakeSource({BLOB: DATA})
    source.checksums[BLOB] = Checksum("crc64nvme", checksums.crc64nvme(DATA))
    assert fetch(engine, store, source).data == DATA
    source.checksums[BLOB] = Checksum("crc64nvme", 5)
    flow = engine.start([Wanted(BLOB, BufferLanding(BLOB), (BLOB.whole(),))], source, store)
    with flow, pytest.raises(IntegrityError):
        flow.join()


def test_a_chunk_that_rotted_on_disk_is_fetched_again(
    engine: Engine, store: Store, expect_log: LogWatch
) -> None:
    expect_log("was changed by somebody: verifying s3://bucket/model.safetensors")
    expect_log("does not match its hash: dropped")
    source = FakeSource({BLOB: DATA})
    fetch(engine, store, source)
    (path,) = store.path.glob("blobs/*/*.data")
    with path.open("r+b") as file:
        file.seek(2 * CHUNK + 77)
        file.write(b"\0rot")
    assert fetch(engine, store, source).data == DATA
    assert source.sent_bytes == SIZE + CHUNK


def test_small_extents_are_not_kept_unless_asked_for(engine: Engine, store: Store) -> None:
    source = FakeSource({BLOB: DATA})
    fetch(engine, store, source, Extent(10, 20))
    assert source.sent_bytes == 10
    wanted = Wanted(BLOB, BufferLanding(BLOB), (Extent(10, 20),), whole_chunks=True)
    with engine.start([wanted], source, store) as flow:
        flow.join()
    assert engine.write_back.drain(20)
    assert source.sent_bytes == 10 + CHUNK
    stored = store.find_blob(BLOB)
    assert stored is not None
    assert stored.present_bytes() == CHUNK
    stored.close()


class SlabLanding(BufferLanding):
    """Lands in the engine's slabs and copies out, as a staged load does."""

    exposes_memory = False

    def __init__(self, blob: Blob, engine: Engine) -> None:
        super().__init__(blob)
        self._engine = engine
        self._leases: dict[int, memoryview] = {}
        self._lock = threading.Lock()

    def reserve(self, extent: Extent) -> Lease | None:
        slab = self._engine.slabs.try_take(len(extent))
        if slab is not None:
            with self._lock:
                self._leases[extent.start // CHUNK] = slab.view
        return slab

    def landed(self, extent: Extent) -> None:
        view = self._leases[extent.start // CHUNK]
        begin = extent.start % CHUNK
        self.memory[extent.start : extent.stop] = view[begin : begin + len(extent)]


def test_queued_write_backs_give_their_slabs_to_a_load_in_need(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of four slabs, a disk that takes a second a chunk: the load still flies."""
    slow_disk(monkeypatch, 1.0)
    engine = Engine(settings.model_copy(update={"memory_budget": 6 << 20}))
    landing = SlabLanding(BLOB, engine)
    begun = time.monotonic()
    wanted = Wanted(BLOB, landing, (BLOB.whole(),))
    flow: Flow
    with engine.start([wanted], FakeSource({BLOB: DATA}), store) as flow:
        flow.join()
    assert time.monotonic() - begun < 2.5
    assert landing.data == DATA
    assert engine.write_back.drain(20)
    monkeypatch.undo()
    assert fetch(engine, store, FakeSource({BLOB: DATA})).data == DATA
