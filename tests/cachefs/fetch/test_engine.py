"""The engine against programmable sources: order, retries, hedges, cancellation, checks."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from awscrt import checksums
from tests.cachefs.fetch.sources import (
    BufferLanding,
    FakeSource,
    Request,
    content,
    fail_once_after,
)
from tests.conftest import LogWatch, SettingsFactory

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, Flow, Priority, Wanted
from weightstream.cachefs.fetch.source import Transfer
from weightstream.cachefs.origin import Checksum
from weightstream.cachefs.store import Store
from weightstream.errors import (
    AccessDeniedError,
    IntegrityError,
    LoadCancelled,
    ThrottledError,
    UnavailableError,
)
from weightstream.settings import Settings

MIB = 1 << 20
CHUNK = 256 << 10
SIZE = 10 * CHUNK + 12345
BLOB = Blob("s3://bucket/model.safetensors", SIZE, "v1")
DATA = content(SIZE)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=tmp_path / "store",
        chunk_size=CHUNK,
        range_size=CHUNK,
        deadline_s=2.0,
        write_back="off",
        store_min_free_bytes=0,
    )


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = Engine(settings)
    yield engine
    engine.close()


def start(engine: Engine, source: FakeSource, *extents: Extent) -> tuple[Flow, BufferLanding]:
    landing = BufferLanding(BLOB)
    wanted = Wanted(BLOB, landing, extents or (BLOB.whole(),))
    return engine.start([wanted], source, None), landing


def test_everything_lands(engine: Engine) -> None:
    flow, landing = start(engine, FakeSource({BLOB: DATA}))
    with flow:
        flow.join()
        progress = flow.progress()
    assert landing.data == DATA
    assert progress.bytes_done == progress.bytes_total == SIZE
    assert progress.bytes_by_source == {"origin": SIZE}
    assert progress.first_byte_s is not None
    assert progress.last_byte_s is not None


def test_only_what_is_wanted_is_fetched(engine: Engine) -> None:
    source = FakeSource({BLOB: DATA})
    flow, landing = start(engine, source, Extent(1000, 2000), Extent(CHUNK, CHUNK + 10))
    with flow:
        flow.join()
    assert source.sent_bytes == 1010
    assert landing.data[1000:2000] == DATA[1000:2000]


def test_small_chunks_share_a_request(settings: Settings) -> None:
    engine = Engine(settings.model_copy(update={"chunk_size": 64 << 10}))
    source = FakeSource({BLOB: DATA})
    flow, landing = start(engine, source)
    with flow:
        flow.join()
    assert landing.data == DATA
    assert len(source.requests) == -(-SIZE // CHUNK)


def test_a_reader_wakes_when_its_own_bytes_are_there(engine: Engine) -> None:
    gate = threading.Event()

    def behave(request: Request, sent: int) -> None:
        if request.extent.start or sent:
            gate.wait(10)

    flow, landing = start(engine, FakeSource({BLOB: DATA}, behave))
    with flow:
        flow.wait(BLOB, Extent(0, 100), timeout_s=5)
        with pytest.raises(TimeoutError):
            flow.wait(BLOB, Extent(0, CHUNK), timeout_s=0.05)
        gate.set()
        flow.join()
    assert landing.data == DATA


def test_broken_ranges_resume_from_the_byte_they_reached(engine: Engine) -> None:
    source = FakeSource({BLOB: DATA}, fail_once_after(128 << 10))
    flow, landing = start(engine, source)
    with flow:
        flow.join()
        assert flow.progress().retries >= 10
    assert landing.data == DATA
    assert source.sent_bytes == SIZE


def test_a_dead_origin_fails_at_the_deadline_and_says_what(engine: Engine) -> None:
    def behave(request: Request, sent: int) -> None:
        raise UnavailableError("s3://bucket/model.safetensors: 127.0.0.1:9 refused")

    flow, _ = start(engine, FakeSource({BLOB: DATA}, behave))
    begun = time.monotonic()
    with flow, pytest.raises(UnavailableError, match=r"refused.*bytes \d+-\d+.*deadline 2 s"):
        flow.join()
    assert time.monotonic() - begun < 10


def test_a_lasting_error_ends_the_flow_at_once(engine: Engine) -> None:
    def behave(request: Request, sent: int) -> None:
        raise AccessDeniedError("403")

    source = FakeSource({BLOB: DATA}, behave)
    flow, _ = start(engine, source)
    with flow, pytest.raises(AccessDeniedError):
        flow.join()
    assert len(source.requests) <= 8


def test_throttling_halves_the_concurrency_and_waits_as_asked(engine: Engine) -> None:
    times: list[float] = []

    def behave(request: Request, sent: int) -> None:
        times.append(time.monotonic())
        if request.number < 3:
            raise ThrottledError("slow down", 0.5)

    flow, landing = start(engine, FakeSource({BLOB: DATA}, behave))
    with flow:
        flow.join()
    assert landing.data == DATA
    assert min(t for t in times[3:]) - times[0] >= 0.5
    assert engine._concurrency.target < 4


def test_one_straggler_is_hedged(engine: Engine) -> None:
    def behave(request: Request, sent: int) -> None:
        if request.extent.start == 3 * CHUNK and request.number < 8 and sent:
            request.sleep(30)

    flow, landing = start(engine, FakeSource({BLOB: DATA}, behave))
    begun = time.monotonic()
    with flow:
        flow.join()
        assert flow.progress().hedges == 1
    assert landing.data == DATA
    assert time.monotonic() - begun < 10


def test_a_link_that_stalls_is_not_asked_for_everything_twice(settings: Settings) -> None:
    engine = Engine(settings.model_copy(update={"concurrency": 10}))
    stall = FakeSource({BLOB: DATA}, lambda request, sent: None if sent else request.sleep(1.6))
    flow, landing = start(engine, stall)
    with flow:
        flow.join()
        assert 1 <= flow.progress().hedges <= 4
    assert landing.data == DATA


def test_a_range_that_fails_after_its_last_byte_is_whole(engine: Engine) -> None:
    """Its hedge has come meanwhile, and there is nothing left to copy from it."""

    class Late(FakeSource):
        def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
            first = not self.requests
            super().read_into(blob, start, into, transfer)
            if first:
                time.sleep(1.5)
                raise UnavailableError("late")

    one = Blob("s3://bucket/one", CHUNK, "v1")
    landing = BufferLanding(one)

    def slowly(request: Request, sent: int) -> None:
        if not request.number and sent > CHUNK // 2:
            time.sleep(1.4)

    source = Late({one: DATA[:CHUNK]}, slowly)
    with engine.start([Wanted(one, landing, (one.whole(),))], source, None) as flow:
        flow.wait(one, one.whole(), timeout_s=10)
        flow._wait_until(lambda: not flow.left, 10)
    assert len(source.requests) == 2
    assert landing.data == DATA[:CHUNK]


def test_a_hedge_that_breaks_gives_its_memory_back(engine: Engine) -> None:
    heard: list[object] = []
    before, threading.excepthook = threading.excepthook, heard.append

    def behave(request: Request, sent: int) -> None:
        if request.number:
            raise ZeroDivisionError("bug")
        if sent == CHUNK // 2:
            request.sleep(1.5)

    one = Blob("s3://bucket/one", CHUNK, "v1")
    try:
        wanted = Wanted(one, BufferLanding(one), (one.whole(),))
        with engine.start([wanted], FakeSource({one: DATA[:CHUNK]}, behave), None) as flow:
            flow.join()
        until = time.monotonic() + 3
        while engine.budget.used_bytes and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        threading.excepthook = before
    assert len(heard) == 1
    assert engine.budget.used_bytes == 0


def test_a_reader_waits_for_every_part_of_a_blob(engine: Engine) -> None:
    source = FakeSource({BLOB: DATA}, lambda request, sent: request.sleep(0.3))
    first = Wanted(BLOB, BufferLanding(BLOB), (Extent(0, CHUNK),))
    second = Wanted(BLOB, BufferLanding(BLOB), (Extent(CHUNK, 2 * CHUNK),))
    with engine.start([first, second], source, None) as flow, pytest.raises(TimeoutError):
        flow.wait(BLOB, Extent(0, 10), timeout_s=0.05)


def test_a_forked_child_need_not_wait_for_its_parents_threads(engine: Engine) -> None:
    flow, _ = start(engine, FakeSource({BLOB: DATA}, lambda request, sent: request.sleep(5)))
    with flow:
        while not flow.jobs:
            time.sleep(0.001)
        child = os.fork()
        if child == 0:
            flow.close()
            os._exit(7)
        until = time.monotonic() + 5
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 7


def test_a_waiter_that_got_busy_leaves_no_piece_unwatched(
    settings: Settings,
) -> None:
    """Chunks are held elsewhere, the thread that looks for them gets a long job: others look."""
    engine = Engine(settings.model_copy(update={"write_back": "on", "concurrency": 2}))
    with Store.open(settings) as store, store.open_blob(BLOB) as holder:
        assert holder.try_lock(1)
        assert holder.try_lock(2)

        def behave(request: Request, sent: int) -> None:
            if request.extent.start == CHUNK:
                request.sleep(3)

        extents = (Extent(CHUNK, 3 * CHUNK),)
        wanted = Wanted(BLOB, BufferLanding(BLOB), extents)
        with engine.start([wanted], FakeSource({BLOB: DATA}, behave), store) as flow:
            time.sleep(0.3)
            holder.unlock(1)
            time.sleep(0.3)
            holder.unlock(2)
            flow.wait(BLOB, Extent(2 * CHUNK, 3 * CHUNK), timeout_s=1)
        assert engine.write_back.drain(10)


def test_demand_goes_first(settings: Settings) -> None:
    engine = Engine(settings.model_copy(update={"concurrency": 1}))
    first = threading.Event()
    boosted = threading.Event()

    def behave(request: Request, sent: int) -> None:
        first.set()
        boosted.wait(10)

    source = FakeSource({BLOB: DATA}, behave)
    flow, _ = start(engine, source)
    with flow:
        first.wait(10)
        flow.boost(BLOB, Extent(7 * CHUNK, 7 * CHUNK + 1))
        boosted.set()
        flow.join()
    assert source.requests[1].extent.start == 7 * CHUNK


def test_an_urgent_flow_overtakes_a_background_one(settings: Settings) -> None:
    engine = Engine(settings.model_copy(update={"concurrency": 1}))
    other = Blob("s3://bucket/other", SIZE, "v1")
    go = threading.Event()

    def behave(request: Request, sent: int) -> None:
        go.wait(10)

    source = FakeSource({BLOB: DATA, other: DATA}, behave)
    fill = Wanted(BLOB, BufferLanding(BLOB), (BLOB.whole(),), Priority.BACKGROUND)
    need = Wanted(other, BufferLanding(other), (Extent(0, CHUNK),), Priority.DEMAND)
    with engine.start([fill], source, None) as background:
        while not source.requests:
            time.sleep(0.001)
        with engine.start([need], source, None) as urgent:
            go.set()
            urgent.join()
        background.join()
    assert source.requests[1].blob is other


def test_close_ends_a_flow_that_hangs(engine: Engine) -> None:
    source = FakeSource({BLOB: DATA}, lambda request, sent: request.sleep(60))
    flow, landing = start(engine, source)
    heard: list[str] = []

    def wait() -> None:
        with pytest.raises(LoadCancelled):
            flow.join()
        heard.append("closed")

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    begun = time.monotonic()
    flow.close()
    waiting.join(5)
    assert heard == ["closed"]
    assert time.monotonic() - begun < 5
    count = len(landing.extents)
    time.sleep(0.1)
    assert len(landing.extents) == count


def test_a_landing_without_memory_is_asked_again(engine: Engine) -> None:
    source = FakeSource({BLOB: DATA})
    landing = BufferLanding(BLOB)
    landing.refuse_until_s = time.monotonic() + 0.3
    with engine.start([Wanted(BLOB, landing, (BLOB.whole(),))], source, None) as flow:
        flow.join()
    assert landing.data == DATA


def test_a_landing_that_fails_fails_the_flow(engine: Engine, expect_log: LogWatch) -> None:
    expect_log("unexpected, at s3://bucket/model.safetensors bytes")

    class Broken(BufferLanding):
        def landed(self, extent: Extent) -> None:
            raise ZeroDivisionError("bug")

    wanted = Wanted(BLOB, Broken(BLOB), (BLOB.whole(),))
    with (
        engine.start([wanted], FakeSource({BLOB: DATA}), None) as flow,
        pytest.raises(Exception, match="ZeroDivisionError"),
    ):
        flow.join()


@pytest.mark.parametrize("algorithm", ["crc64nvme", "crc32c"])
def test_the_origins_checksum_is_compared(engine: Engine, algorithm: str) -> None:
    right = getattr(checksums, algorithm)(DATA)
    source = FakeSource({BLOB: DATA})
    source.checksums[BLOB] = Checksum(algorithm, right)  # type: ignore[arg-type]
    flow, _ = start(engine, source)
    with flow:
        flow.join()
    source.checksums[BLOB] = Checksum(algorithm, right ^ 1)  # type: ignore[arg-type]
    flow, _ = start(engine, source)
    with flow, pytest.raises(IntegrityError, match="damaged on the way"):
        flow.join()


def test_an_empty_blob_is_done_at_once(engine: Engine) -> None:
    empty = Blob("s3://bucket/empty", 0, "v1")
    wanted = Wanted(empty, BufferLanding(empty), (empty.whole(),))
    source = FakeSource({empty: b""})
    with engine.start([wanted], source, None) as flow:
        flow.join()
        assert flow.progress().bytes_total == 0
    assert source.requests == []


def test_concurrency_grows_where_it_helps(settings: Settings) -> None:
    size = 400 * CHUNK
    blob = Blob("s3://bucket/big", size, "v1")
    source = FakeSource({blob: content(size)}, lambda request, sent: request.sleep(0.01))
    engine = Engine(settings)
    with engine.start([Wanted(blob, BufferLanding(blob), (blob.whole(),))], source, None) as flow:
        flow.join()
    assert source.most_at_once > 8


def test_nothing_is_charged_after_the_flow(engine: Engine) -> None:
    flow, _ = start(engine, FakeSource({BLOB: DATA}))
    with flow:
        flow.join()
    until = time.monotonic() + 5
    while engine.budget.used_bytes and time.monotonic() < until:
        time.sleep(0.01)
    assert engine.budget.used_bytes == 0


def test_a_reader_waits_for_no_range_that_runs_from_before_fewer_were_to_run(
    store_settings: SettingsFactory,
) -> None:
    blob, may_go = Blob("s3://models/m/a", 16 * MIB, "v1"), threading.Event()

    def behave(request: Request, sent: int) -> None:
        if request.number < 8:
            assert may_go.wait(20)

    source = FakeSource({blob: content(blob.size)}, behave)
    engine = Engine(store_settings(chunk_size=MIB, range_size=MIB, max_concurrency=12))
    engine._concurrency = replace(engine._concurrency, target=8, hold_windows=1000)
    with engine.start([Wanted(blob, BufferLanding(blob), (blob.whole(),))], source, None) as flow:
        while len(source.requests) < 8:
            time.sleep(0.001)
        engine._concurrency = replace(engine._concurrency, target=2)
        for chunk in (15, 14, 13):
            demanded = Extent(chunk * MIB, (chunk + 1) * MIB)
            flow.boost(blob, demanded)
            flow.boost(blob, demanded)  # what is asked for twice counts once
            flow.wait(blob, demanded, timeout_s=10)
        assert [request.extent.start // MIB for request in source.requests[8:]] == [15, 14, 13]
        may_go.set()
        flow.join()
    engine.close()
