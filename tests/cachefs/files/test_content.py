"""Reads, fills and memory of a mount's files, against programmable sources and a real store."""

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from awscrt import checksums
from tests.cachefs.fetch.sources import Behaviour, FakeSource, Request, content
from tests.conftest import LogWatch

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine
from weightstream.cachefs.files.content import Content
from weightstream.cachefs.files.tree import File
from weightstream.cachefs.origin import Checksum
from weightstream.cachefs.store import Store
from weightstream.errors import (
    LoadCancelled,
    NotFoundError,
    ObjectChangedError,
    UnavailableError,
    WeightstreamError,
)
from weightstream.settings import Settings

CHUNK = 256 << 10
PATIENCE_S = 20.0


def until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; False when it does not come true in a long time."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@dataclass
class Answer:
    """Collects what a read is answered."""

    data: bytes | None = None
    error: WeightstreamError | None = None
    count: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, views: Sequence[memoryview], error: WeightstreamError | None) -> None:
        self.count += 1
        self.data, self.error = b"".join(views), error
        self.done.set()

    def wait(self) -> "Answer":
        assert self.done.wait(PATIENCE_S), "no answer"
        return self


def made_file(path: str, size: int, seed: int = 0, version: str = "v1") -> tuple[File, bytes]:
    return File(path, Blob(f"s3://bucket/{path}", size, version), 0), content(size, seed)


class Scene:
    """A content over files of a fake origin."""

    def __init__(self, tmp_path: Path, files: dict[File, bytes], behaviour: Behaviour | None,
                 **settings: object) -> None:  # fmt: skip
        given: dict[str, object] = {
            "store": tmp_path / "store",
            "chunk_size": CHUNK,
            "range_size": CHUNK,
            "memory_budget": 16 << 20,
            "deadline_s": 10.0,
            "store_min_free_bytes": 0,
        }
        self.settings = Settings(**(given | settings))
        self.files = files
        self.source = FakeSource({file.blob: data for file, data in files.items()}, behaviour)
        self.engine = Engine(self.settings)
        self.store = Store.open(self.settings)
        self.content = Content(
            self.source, self.store, self.engine, self.settings, lambda file: list(files)
        )
        self.completed: list[Blob] = []
        self.content.on_complete = self.completed.append

    def read(self, file: File, start: int, stop: int) -> Answer:
        answer = Answer()
        self.content.read(file, Extent(start, stop), answer)
        return answer

    def close(self) -> None:
        self.content.close()
        self.engine.close()
        self.store.close()


@pytest.fixture
def make_scene(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(
        files: dict[File, bytes], behaviour: Behaviour | None = None, **settings: object
    ) -> Scene:
        made.append(Scene(tmp_path, files, behaviour, **settings))
        return made[-1]

    yield make
    for scene in made:
        scene.close()


SIZE = 12 * CHUNK + 4321
FILE, DATA = made_file("llama/model.safetensors", SIZE)


def test_a_read_is_answered_once_with_its_bytes(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene({FILE: DATA})
    answer = scene.read(FILE, 100, 5000).wait()
    assert (answer.data, answer.error) == (DATA[100:5000], None)
    assert until(lambda: not scene.content.gauges()["demands"])
    assert answer.count == 1


def test_a_read_over_the_end_is_cut_and_one_beyond_it_is_empty(
    make_scene: Callable[..., Scene],
) -> None:
    scene = make_scene({FILE: DATA})
    assert scene.read(FILE, SIZE - 10, SIZE + 4096).wait().data == DATA[-10:]
    assert scene.read(FILE, SIZE + 1, SIZE + 4096).wait().data == b""


def test_a_read_over_chunk_borders_is_whole(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene({FILE: DATA}, fill="off")
    assert scene.read(FILE, CHUNK - 7, 4 * CHUNK + 9).wait().data == DATA[CHUNK - 7 : 4 * CHUNK + 9]


def test_a_load_completes_the_file_and_says_so(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene({FILE: DATA})
    scene.read(FILE, 0, 4096).wait()
    assert until(lambda: scene.completed == [FILE.blob])
    assert scene.content.is_complete(FILE.blob)
    assert scene.source.sent_bytes == SIZE
    assert scene.content.state(FILE.blob).state == "complete"


def test_what_was_filled_ahead_lies_in_memory_until_it_is_read(
    make_scene: Callable[..., Scene],
) -> None:
    scene = make_scene({FILE: DATA})
    scene.read(FILE, 0, 4096).wait()
    assert until(lambda: bool(scene.completed))
    assert scene.content.lies_in_memory(FILE.blob)
    for start in range(0, SIZE, 100_000):
        assert scene.read(FILE, start, start + 100_000).wait().data == DATA[start : start + 100_000]
    assert not scene.content.lies_in_memory(FILE.blob)
    assert scene.content.memory.unread_bytes(FILE.blob) == 0


def test_what_a_fill_brings_behind_its_reader_is_not_waited_for(
    make_scene: Callable[..., Scene],
) -> None:
    scene = make_scene({FILE: DATA})
    assert scene.read(FILE, 0, SIZE).wait().data == DATA
    assert until(lambda: bool(scene.completed))
    memory, again, whole = scene.content.memory, object(), FILE.blob.whole()
    slab = memory.reserve(FILE.blob, whole, CHUNK, again)
    assert slab is not None
    memory.landed(FILE.blob, whole, CHUNK, again)
    slab.release()
    assert memory.unread_bytes(FILE.blob) == SIZE
    assert not scene.content.lies_in_memory(FILE.blob)


def test_what_one_fetch_brings_says_nothing_of_the_memory_of_another(
    make_scene: Callable[..., Scene],
) -> None:
    """A demand and a fill may both bring a chunk; the slab of the later one has old bytes in it."""
    memory, whole = make_scene({FILE: DATA}).content.memory, Extent(0, CHUNK)
    slabs = [memory.reserve(FILE.blob, whole, CHUNK, owner) for owner in ("fill", "demand")]
    memory.landed(FILE.blob, whole, CHUNK, "fill")
    assert not memory.has(FILE.blob, whole, CHUNK)
    memory.landed(FILE.blob, whole, CHUNK, "demand")
    assert memory.has(FILE.blob, whole, CHUNK)
    for slab in slabs:
        assert slab is not None
        slab.release()


def test_what_is_complete_is_read_from_the_store(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene({FILE: DATA})
    scene.read(FILE, 0, 4096).wait()
    assert until(lambda: bool(scene.completed))
    scene.content.memory.drop_all()
    asked = len(scene.source.requests)
    for start in range(0, SIZE, 100_000):
        assert scene.read(FILE, start, start + 100_000).wait().data == DATA[start : start + 100_000]
    assert len(scene.source.requests) == asked


def test_the_backing_descriptor_is_of_the_right_bytes_and_only_when_complete(
    make_scene: Callable[..., Scene],
) -> None:
    scene = make_scene({FILE: DATA})
    assert scene.content.backing(FILE.blob) is None
    scene.read(FILE, 0, 4096).wait()
    assert until(lambda: bool(scene.completed))
    fd = scene.content.backing(FILE.blob)
    assert fd is not None
    with open(fd, "rb") as file:
        assert file.read() == DATA


def test_readers_are_answered_before_the_chunk_is_whole(make_scene: Callable[..., Scene]) -> None:
    go_on = threading.Event()

    def stop_in_the_middle(request: Request, sent: int) -> None:
        if sent >= CHUNK // 2 and not go_on.wait(PATIENCE_S):
            raise UnavailableError("the test hung")

    scene = make_scene({FILE: DATA}, stop_in_the_middle, fill="off", hedge="off")
    assert scene.read(FILE, 0, 4096).wait().data == DATA[:4096]
    later = scene.read(FILE, CHUNK - 4096, CHUNK)
    assert not later.done.is_set()
    go_on.set()
    assert later.wait().data == DATA[CHUNK - 4096 : CHUNK]


def test_many_readers_of_one_file_cost_one_fetch(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene({FILE: DATA})
    rng = random.Random(1)
    extents = [Extent(at, at + 3000) for at in rng.choices(range(SIZE - 3000), k=300)]
    answers = [(extent, scene.read(FILE, extent.start, extent.stop)) for extent in extents]
    for extent, answer in answers:
        assert answer.wait().data == DATA[extent.start : extent.stop]
    assert until(lambda: bool(scene.completed))
    assert scene.source.sent_bytes == SIZE


def test_the_shards_behind_are_filled_in_order(make_scene: Callable[..., Scene]) -> None:
    shards = dict(
        made_file(f"m/model-{i:05}-of-00003.safetensors", 5 * CHUNK, seed=i) for i in (1, 2, 3)
    )
    first, second, third = shards
    scene = make_scene(shards)
    scene.read(second, 0, 4096).wait()
    assert until(lambda: len(scene.completed) == 3)
    asked = list(dict.fromkeys(request.blob for request in scene.source.requests))
    assert asked == [second.blob, third.blob, first.blob]


def test_a_file_that_is_looked_at_is_not_filled(make_scene: Callable[..., Scene]) -> None:
    big, data = made_file("m/big.safetensors", 300 * CHUNK)
    scene = make_scene({big: data})
    assert scene.read(big, 0, 4096).wait().data == data[:4096]
    assert until(lambda: not scene.content.gauges()["demands"])
    assert scene.content.gauges()["fills"] == 0
    assert scene.source.sent_bytes == CHUNK


def test_a_demand_goes_before_the_fill(make_scene: Callable[..., Scene]) -> None:
    gate = threading.Semaphore(0)

    def one_by_one(request: Request, sent: int) -> None:
        if sent == 0 and not gate.acquire(timeout=PATIENCE_S):
            raise UnavailableError("the test hung")

    big, data = made_file("m/big.safetensors", 300 * CHUNK)
    scene = make_scene({big: data}, one_by_one, concurrency=1, hedge="off")
    begun = scene.read(big, 50 * CHUNK, 50 * CHUNK + 10)
    gate.release()
    begun.wait()
    assert until(lambda: bool(scene.content.gauges()["fills"]))
    late = scene.read(big, 250 * CHUNK, 250 * CHUNK + 10)
    for _ in range(5):
        gate.release()
    assert late.wait().data == data[250 * CHUNK : 250 * CHUNK + 10]
    for _ in range(300):
        gate.release()


def test_a_read_that_is_cancelled_is_answered_at_once(make_scene: Callable[..., Scene]) -> None:
    stuck = threading.Event()

    def hang(request: Request, sent: int) -> None:
        stuck.set()
        request.sleep(PATIENCE_S)

    scene = make_scene({FILE: DATA}, hang)
    answer = Answer()
    ticket = scene.content.read(FILE, Extent(0, 10), answer)
    assert stuck.wait(PATIENCE_S)
    scene.content.cancel(ticket)
    assert isinstance(answer.wait().error, LoadCancelled)
    scene.content.cancel(ticket)
    assert answer.count == 1
    assert scene.content.gauges()["parked_reads"] == 0


def test_a_read_has_a_deadline_and_the_next_one_works(make_scene: Callable[..., Scene]) -> None:
    hangs = True

    def hang(request: Request, sent: int) -> None:
        if hangs:
            request.sleep(PATIENCE_S)

    scene = make_scene(
        {FILE: DATA}, hang, hedge="off", deadline_s=1.0, stall_timeout_s=0.5, connect_timeout_s=0.5
    )
    scene.content.read_deadline_s = 0.3
    error = scene.read(FILE, 0, 10).wait().error
    assert isinstance(error, UnavailableError)
    assert "bytes 0-9" in str(error)
    hangs = False
    scene.content.read_deadline_s = PATIENCE_S
    other = scene.read(FILE, 8 * CHUNK, 8 * CHUNK + 10)
    assert other.wait().data == DATA[8 * CHUNK : 8 * CHUNK + 10]


@pytest.mark.parametrize("error", [NotFoundError("gone"), ObjectChangedError("replaced")])
def test_what_the_origin_says_is_what_readers_hear(
    make_scene: Callable[..., Scene], error: WeightstreamError
) -> None:
    def fail(request: Request, sent: int) -> None:
        raise error

    scene = make_scene({FILE: DATA}, fail)
    changed: list[File] = []
    scene.content.on_changed = changed.append
    assert scene.read(FILE, 0, 10).wait().error is error
    if isinstance(error, ObjectChangedError):
        assert until(lambda: changed != [] and set(changed) == {FILE})


def test_a_failed_fill_does_not_spoil_later_reads(make_scene: Callable[..., Scene]) -> None:
    fails = True

    def fail(request: Request, sent: int) -> None:
        if fails:
            raise NotFoundError("not yet")

    scene = make_scene({FILE: DATA}, fail)
    assert scene.read(FILE, 0, 10).wait().error is not None
    fails = False
    assert scene.read(FILE, 0, 10).wait().data == DATA[:10]


def test_without_a_store_reads_work_and_nothing_is_filled(tmp_path: Path) -> None:
    settings = Settings(
        store=tmp_path / "none", chunk_size=CHUNK, range_size=CHUNK, memory_budget=4 << 20
    )
    source, engine = FakeSource({FILE.blob: DATA}), Engine(settings)
    content_ = Content(source, None, engine, settings, lambda file: [])
    try:
        for start in range(0, SIZE, 70_001):
            assert (
                content_.read_now(FILE, Extent(start, start + 70_001))
                == DATA[start : start + 70_001]
            )
        assert not content_.is_complete(FILE.blob)
    finally:
        content_.close()
        engine.close()


def test_memory_stays_within_the_budget_and_goes_back(
    make_scene: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightstream.cachefs.files.shelf._IDLE_S", 0.3)
    big, data = made_file("m/big.safetensors", 300 * CHUNK)
    scene = make_scene({big: data}, memory_budget=16 << 20)
    peak = 0
    for start in range(0, big.blob.size, 1 << 20):
        assert (
            scene.read(big, start, start + (1 << 20)).wait().data == data[start : start + (1 << 20)]
        )
        peak = max(peak, scene.engine.budget.used_bytes)
    assert peak <= 16 << 20
    assert until(lambda: bool(scene.completed))
    assert until(lambda: set(scene.content.gauges().values()) == {0})


def test_a_full_store_serves_on_without_keeping(
    make_scene: Callable[..., Scene], expect_log: LogWatch
) -> None:
    expect_log.allow("going on without the store|has room")
    scene = make_scene({FILE: DATA}, store_max_bytes=4 * CHUNK)
    for start in range(0, SIZE, 100_000):
        assert scene.read(FILE, start, start + 100_000).wait().data == DATA[start : start + 100_000]
    assert scene.completed == []


def test_corrupt_bytes_in_the_store_are_fetched_again(
    make_scene: Callable[..., Scene], expect_log: LogWatch
) -> None:
    scene = make_scene({FILE: DATA}, fill="off")
    scene.read(FILE, 0, 10).wait()
    assert until(lambda: not scene.content.gauges()["demands"])
    assert scene.engine.write_back.drain(PATIENCE_S)
    scene.content.close()
    scene.engine.close()
    with scene.store.open_blob(FILE.blob) as stored:
        assert stored.present_bytes() >= CHUNK
        path = stored.data_path
    scene.store.close()
    with path.open("r+b") as file:
        file.write(b"\xff" * 100)
    expect_log("does not match its hash")
    again = make_scene({FILE: DATA}, fill="off")
    assert again.read(FILE, 0, 200).wait().data == DATA[:200]


def test_the_order_of_a_load_is_replayed_by_the_next(make_scene: Callable[..., Scene]) -> None:
    first = make_scene({FILE: DATA})
    for chunk in (7, 3, 11):
        first.read(FILE, chunk * CHUNK, chunk * CHUNK + 10).wait()
    assert until(lambda: bool(first.completed))
    first.close()
    Store.open(first.settings).remove("s3://")
    second = make_scene({FILE: DATA}, concurrency=1)
    second.read(FILE, 7 * CHUNK, 7 * CHUNK + 10).wait()
    assert until(lambda: bool(second.completed))
    fetched = [r.extent.start // CHUNK for r in second.source.requests]
    assert fetched[:3] == [7, 3, 11]


def test_closing_answers_everybody(make_scene: Callable[..., Scene]) -> None:
    def hang(request: Request, sent: int) -> None:
        request.sleep(PATIENCE_S)

    scene = make_scene({FILE: DATA}, hang, hedge="off")
    answers = [scene.read(FILE, i * CHUNK, i * CHUNK + 10) for i in range(5)]
    scene.content.close()
    assert all(isinstance(a.wait().error, LoadCancelled) for a in answers)
    assert isinstance(scene.read(FILE, 0, 1).wait().error, LoadCancelled)


def test_an_open_waits_for_a_fill_that_is_about_to_end(make_scene: Callable[..., Scene]) -> None:
    scene = make_scene({FILE: DATA}, open_wait_s=PATIENCE_S)
    scene.read(FILE, 0, 10).wait()
    assert until(lambda: bool(scene.source.sent_bytes > CHUNK or scene.completed))

    def is_complete_once_opened() -> bool:
        scene.content.opened(FILE)
        return scene.content.is_complete(FILE.blob)

    assert until(is_complete_once_opened)


def test_r4_threads_that_read_and_cancel_with_little_memory(
    make_scene: Callable[..., Scene],
) -> None:
    """Readers that come and go, memory for eight chunks, a slow and shaky origin: nobody hangs."""
    rng = random.Random(7)

    def shaky(request: Request, sent: int) -> None:
        if rng.random() < 0.02:
            raise UnavailableError("reset")
        if rng.random() < 0.1:
            request.sleep(0.002)

    files = dict(
        made_file(f"m/model-{i:05}-of-00004.safetensors", 40 * CHUNK, i) for i in range(1, 5)
    )
    scene = make_scene(files, shaky, memory_budget=8 << 20, deadline_s=60.0)
    wrong: list[str] = []

    def work(seed: int) -> None:
        mine = random.Random(seed)
        for _ in range(60):
            file = mine.choice(list(files))
            start = mine.randrange(file.blob.size)
            extent = Extent(start, min(file.blob.size, start + mine.randrange(1, 400_000)))
            answer = Answer()
            ticket = scene.content.read(file, extent, answer)
            if mine.random() < 0.3:
                scene.content.cancel(ticket)
            if not answer.done.wait(90):
                wrong.append(f"hung: {file.path} {extent}")
            elif answer.error is None and answer.data != files[file][extent.start : extent.stop]:
                wrong.append(f"wrong bytes: {file.path} {extent}")
            elif answer.error is not None and not isinstance(answer.error, LoadCancelled):
                wrong.append(str(answer.error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert until(lambda: scene.content.gauges()["parked_reads"] == 0)


@pytest.mark.parametrize("right", [True, False])
def test_a_file_that_came_in_parts_is_compared_with_the_origins_checksum(
    make_scene: Callable[..., Scene], expect_log: LogWatch, right: bool
) -> None:
    scene = make_scene({FILE: DATA})
    value = checksums.crc64nvme(DATA) + (not right)
    scene.source.checksums[FILE.blob] = Checksum("crc64nvme", value)
    if not right:
        expect_log("damaged on the way")
    scene.read(FILE, 5 * CHUNK, 5 * CHUNK + 10).wait()
    assert until(lambda: not scene.content.gauges()["fills"] and scene.source.sent_bytes >= SIZE)
    assert scene.engine.write_back.drain(PATIENCE_S)
    assert scene.content.is_complete(FILE.blob) is right
    if not right:
        assert scene.content.state(FILE.blob).present_bytes == 0
