"""What a source is told of a flow, and when that ends."""

import ctypes
import mmap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.cachefs.fetch.sources import BufferLanding
from tests.conftest import SettingsFactory
from tests.kit.models import random_bytes

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, Flow, Priority, Wanted
from weightstream.cachefs.fetch.claims import Claims
from weightstream.cachefs.fetch.piece import Part
from weightstream.cachefs.fetch.plans import joined
from weightstream.cachefs.fetch.source import Transfer
from weightstream.cachefs.prefetch import SlabLanding
from weightstream.cachefs.store import Store
from weightstream.errors import UnavailableError

MIB = 1 << 20
DATA = random_bytes(4 * MIB, "plans")
BLOB = Blob("s3://models/m/file", len(DATA), "v1")

Told = Sequence[tuple[Blob, tuple[Extent, ...]]]


class Planner:
    """A source in memory that hears of plans; each may take its time, or fail."""

    name = "planner"
    brings = True

    def __init__(self) -> None:
        self.plans: list[Told] = []
        self.hurried: list[Extent] = []
        self.told = threading.Event()
        self.ended = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.fails = False

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        into[:] = DATA[start : start + len(into)]
        transfer.advance(len(into))

    def plan(self, wanted: Told) -> "Planner":
        self.plans.append(wanted)
        self.told.set()
        assert self.may_answer.wait(10)
        if self.fails:
            raise UnavailableError("closing")
        return self

    def hurry(self, blob: Blob, extent: Extent) -> None:
        self.hurried.append(extent)

    def close(self) -> None:
        self.ended.set()


class Unplanned:
    """A source that does nothing until it may."""

    name = "waiting"

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.may_go = threading.Event()

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        self.asked.set()
        assert self.may_go.wait(10)
        transfer.advance(len(into))


class Waiting(Unplanned):
    """One that hears of plans."""

    brings = True

    def __init__(self) -> None:
        super().__init__()
        self.told = threading.Event()
        self.hurried: list[Extent] = []

    def plan(self, wanted: Told) -> "Waiting":
        self.told.set()
        return self

    def hurry(self, blob: Blob, extent: Extent) -> None:
        self.hurried.append(extent)

    def close(self) -> None:
        return


def resident_bytes(memory: mmap.mmap) -> int:
    """Return how much of a mapping has pages."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pages = (ctypes.c_ubyte * (len(memory) // mmap.PAGESIZE))()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    assert libc.mincore(address, len(memory), pages) == 0
    return mmap.PAGESIZE * sum(page & 1 for page in pages)


@pytest.fixture
def engine(store_settings: SettingsFactory) -> Iterator[Engine]:
    made = Engine(store_settings())
    yield made
    made.close()


@pytest.fixture
def store(store_settings: SettingsFactory, tmp_path: Path) -> Iterator[Store]:
    with Store.open(store_settings()) as opened:
        yield opened


def start(
    engine: Engine,
    source: Planner,
    store: Store | None = None,
    extents: tuple[Extent, ...] = (BLOB.whole(),),
) -> Flow:
    wanted = Wanted(BLOB, SlabLanding(engine.slabs), extents)
    return engine.start([wanted], source, store)


def test_a_source_hears_what_is_wanted_and_that_it_is_over(engine: Engine) -> None:
    source = Planner()
    with start(engine, source) as flow:
        assert source.told.wait(5)
        flow.join()
        assert source.plans == [((BLOB, (BLOB.whole(),)),)]
        assert not source.ended.is_set()
    assert source.ended.wait(5)


def test_it_hears_only_what_the_store_lacks(engine: Engine, store: Store) -> None:
    source = Planner()
    with start(engine, source, store, (Extent(MIB, 2 * MIB),)) as flow:
        flow.join()
    assert engine.write_back.drain(10)
    with start(engine, source, store) as flow:
        flow.join()
    assert engine.write_back.drain(10)
    assert source.ended.wait(5)
    assert source.plans[1] == ((BLOB, (Extent(0, MIB), Extent(2 * MIB, 4 * MIB))),)
    with start(engine, source, store) as flow:
        flow.join()
    assert engine.write_back.drain(10)
    assert len(source.plans) == 2


def test_it_does_not_hear_of_single_demands(engine: Engine) -> None:
    source = Planner()
    landing = SlabLanding(engine.slabs)
    demanded = Wanted(BLOB, landing, (Extent(0, MIB),), Priority.DEMAND)
    ahead = Wanted(BLOB, landing, (Extent(MIB, 2 * MIB),), Priority.PLANNED)
    with engine.start([demanded, ahead], source, None) as flow:
        flow.join()
    assert source.plans == []


def test_a_source_that_thinks_holds_up_nobody(engine: Engine) -> None:
    source = Planner()
    source.may_answer.clear()
    with start(engine, source) as flow:
        flow.join()
    assert not source.ended.is_set()
    source.may_answer.set()  # its plan comes when the flow has been closed
    assert source.ended.wait(5)


def test_a_source_that_takes_no_plan_is_read_all_the_same(engine: Engine) -> None:
    source = Planner()
    source.fails = True
    with start(engine, source) as flow:
        flow.join()
    assert source.told.wait(5)
    assert not source.ended.is_set()


def test_neighbours_are_joined_in_the_order_in_which_they_are_wanted() -> None:
    given = [Extent(4, 6), Extent(6, 7), Extent(0, 2), Extent(2, 4)]
    assert joined(given) == (Extent(4, 7), Extent(0, 4))


@pytest.mark.parametrize("brings", [True, False])
def test_memory_is_faulted_in_ahead_but_not_for_a_source_that_begins_by_itself(
    store_settings: SettingsFactory, brings: bool
) -> None:
    engine = Engine(store_settings(chunk_size=8 * MIB, range_size=8 * MIB))
    blob = Blob("s3://models/m/large", 32 * MIB, "v1")
    source = Waiting() if brings else Unplanned()
    landing = BufferLanding(blob)
    with engine.start([Wanted(blob, landing, (blob.whole(),))], source, None) as flow:
        assert source.asked.wait(10)
        resident = resident_bytes(landing.memory)
        source.may_go.set()
        flow.join()
    engine.close()
    assert (resident == 0) is brings


def test_a_source_hears_at_once_that_a_reader_waits(engine: Engine) -> None:
    blob = Blob("s3://models/m/large", 32 * MIB, "v1")
    source, extent = Waiting(), Extent(8 * MIB, 16 * MIB)
    with engine.start([Wanted(blob, BufferLanding(blob), (blob.whole(),))], source, None) as flow:
        assert source.told.wait(10)
        deadline_s = time.monotonic() + 10
        while not source.hurried and time.monotonic() < deadline_s:  # it was told a moment ago
            flow.boost(blob, extent)
            time.sleep(0.01)
        source.may_go.set()
        flow.join()
    assert source.hurried[0] == extent


@pytest.mark.parametrize("brings", [True, False])
def test_a_source_that_brings_the_rest_by_itself_is_asked_for_one_chunk_at_a_time(
    brings: bool,
) -> None:
    blob = Blob("s3://models/m/large", 8 * MIB, "v1")
    part = Part(Wanted(blob, BufferLanding(blob), (blob.whole(),)), None, False, MIB)
    claims = Claims([part], 4 * MIB, 1.0, brings)
    claims.boost(part.overlapping(Extent(2 * MIB, 3 * MIB)))
    run = claims.next_run()
    assert run is not None
    assert run.extent == Extent(2 * MIB, (3 if brings else 6) * MIB)
