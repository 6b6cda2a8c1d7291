"""What a source is told of a flow, and when that ends."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.conftest import SettingsFactory
from tests.kit.models import random_bytes

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, Flow, Priority, Wanted
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

    def __init__(self) -> None:
        self.plans: list[Told] = []
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

    def close(self) -> None:
        self.ended.set()


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
