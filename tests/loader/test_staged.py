"""Staging: bytes through slabs into tensors of their own, in bounded memory. No network."""

import random
import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.loader.attacks.corpus import entry, file

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.budget import MemoryBudget
from weightstream.cachefs.fetch.slabs import SlabPool
from weightstream.loader.copiers import HostCopier
from weightstream.loader.gate import Gate
from weightstream.loader.headers import read_header
from weightstream.loader.plan import Place, Shard, make_plan, natural_order
from weightstream.loader.staged import Staging

MIB = 1 << 20


def model(sizes: list[int]) -> tuple[bytes, list[Place]]:
    """Return a file with byte tensors of these sizes, and their places."""
    at, entries = 0, {}
    for i, size in enumerate(sizes):
        entries[f"layer.{i}"] = entry(at, at + size, "U8", [size])
        at += size
    data = file(entries, random.Random(at).randbytes(at))
    blob = Blob("s3://b/m/x.safetensors", len(data), "v")
    shard = Shard(blob, read_header(blob, lambda e: data[e.start : e.stop]))
    return data, list(make_plan([shard], None, None).places)


def staging(
    places: list[Place], limit: int = 8 * MIB, *, in_order: bool = False
) -> tuple[Staging, MemoryBudget]:
    budget = MemoryBudget(limit)
    copier = HostCopier(SlabPool(budget).try_take)
    return Staging(places, copier, Gate(budget), in_order=in_order), budget


def deliver(one: Staging, data: bytes, extent: Extent, step: int = 1 << 30) -> bool:
    """Do what the engine does with one range; False when the landing has no room."""
    landing = next(iter(one.landings.values()))
    lease = landing.reserve(extent)
    if lease is None:
        return False
    for start in range(extent.start, extent.stop, step):
        stop = min(start + step, extent.stop)
        lease.view[start - extent.start : stop - extent.start] = data[start:stop]
        landing.landed(Extent(start, stop))
    lease.release()
    return True


def take(one: Staging, data: bytes) -> str | None:
    target = one.next_ready(0)
    if target is None:
        return None
    tensor = one.hand_over(target)
    extent = target.place.info.extent
    assert bytes(tensor.tolist()) == data[extent.start : extent.stop]
    one.let_go(target)
    return target.place.name


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    cuts=st.lists(st.integers(1, 200), max_size=6),
    step=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_any_ranges_in_any_order_make_the_same_tensors(
    sizes: list[int], cuts: list[int], step: int, seed: int
) -> None:
    data, places = model(sizes)
    one, _ = staging(places)
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    ranges = [Extent(a, b) for a, b in pairwise(borders)]
    random.Random(seed).shuffle(ranges)
    for extent in ranges:
        assert deliver(one, data, extent, step)
    names = {take(one, data) for _ in places}
    assert names == {place.name for place in places}
    assert one.left == 0


def test_large_tensors_own_huge_memory_and_small_ones_share_the_heap() -> None:
    data, places = model([3 * MIB, 10])
    one, _ = staging(places, 16 * MIB)
    assert deliver(one, data, Extent(0, len(data)), MIB)
    tensors = []
    while (target := one.next_ready(0)) is not None:
        tensors.append(one.hand_over(target))
        one.let_go(target)
    assert [t.numel() for t in tensors] == [3 * MIB, 10]
    assert torch.equal(
        tensors[0], torch.frombuffer(bytearray(data[-3 * MIB - 10 : -10]), dtype=torch.uint8)
    )


def test_a_consumer_that_is_behind_holds_the_fetch_back() -> None:
    data, places = model([MIB] * 8)
    one, budget = staging(places, 8 * MIB)
    start = places[0].info.extent.start
    admitted = 0
    for i in range(8):
        if not deliver(one, data, Extent(start + i * MIB, start + (i + 1) * MIB)):
            break
        admitted += 1
    assert admitted == 4, "half of the budget"
    assert budget.used_bytes <= budget.limit_bytes
    assert take(one, data) == "layer.0"
    assert deliver(one, data, Extent(start + 4 * MIB, start + 5 * MIB))


def test_a_tensor_larger_than_the_budget_arrives() -> None:
    data, places = model([100, 20 * MIB])
    one, _ = staging(places, 4 * MIB)
    for start in range(0, len(data), MIB):
        assert deliver(one, data, Extent(start, min(start + MIB, len(data)))), start
        if start == 0:
            assert take(one, data) == "layer.0"
    assert take(one, data) == "layer.1"


def test_two_streams_that_hold_the_whole_budget_both_go_on() -> None:
    data, places = model([MIB] * 4)
    budget = MemoryBudget(2 * MIB)
    pool = SlabPool(budget)
    ones = [
        Staging(places, HostCopier(pool.try_take), Gate(budget), in_order=False) for _ in range(2)
    ]
    assert budget.try_acquire(2 * MIB), "somebody else holds everything"
    start = places[0].info.extent.start
    for i in range(4):
        for one in ones:
            assert deliver(one, data, Extent(start + i * MIB, start + (i + 1) * MIB))
            assert take(one, data) == f"layer.{i}"


def test_natural_order_waits_for_its_turn() -> None:
    data, places = model([10] * 12)
    one, _ = staging(natural_order(places), in_order=True)
    at = places[0].info.extent.start
    assert deliver(one, data, Extent(at + 10, len(data)))
    assert take(one, data) is None
    head = one.head
    assert head is not None
    assert head.place.name == "layer.0"
    assert deliver(one, data, Extent(0, at + 10))
    assert [take(one, data) for _ in range(12)] == [f"layer.{i}" for i in range(12)]


def test_memory_comes_back_when_a_fetch_is_given_up() -> None:
    data, places = model([MIB] * 4)
    one, budget = staging(places)
    landing = next(iter(one.landings.values()))
    start = places[0].info.extent.start
    leases = [landing.reserve(Extent(start + i * MIB, start + (i + 1) * MIB)) for i in range(3)]
    assert deliver(one, data, Extent(start + 3 * MIB, len(data)))
    for lease in leases:
        assert lease is not None
        lease.release()
    assert one.gate is not None
    assert one.gate.held_bytes == MIB
    one.gate.close()
    assert one.gate.held_bytes == 0
    assert budget.used_bytes <= 4 * MIB, "idle slabs only"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=30), st.randoms())
def test_the_gate_never_charges_more_than_it_returns(
    steps: list[tuple[int, bool]], order: random.Random
) -> None:
    budget = MemoryBudget(100)
    gate = Gate(budget)
    held: list[int] = []
    for count, starving in steps:
        before = gate.held_bytes
        admitted = gate.admit(count, starving=starving)
        assert admitted or not starving
        assert gate.held_bytes <= gate.limit_bytes or starving or before == gate.held_bytes
        if admitted:
            held.append(count)
        if held and order.random() < 0.5:
            gate.let_go(held.pop(order.randrange(len(held))))
        assert 0 <= budget.used_bytes <= max(gate.limit_bytes, 0)
    for count in held:
        gate.let_go(count)
    assert gate.held_bytes == 0
    assert budget.used_bytes == 0


def test_many_threads_land_one_model() -> None:
    data, places = model([70_000] * 40)
    one, _ = staging(places, 64 * MIB)
    ranges = [Extent(s, min(s + 50_000, len(data))) for s in range(0, len(data), 50_000)]
    random.Random(1).shuffle(ranges)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not ranges:
                    return
                extent = ranges.pop()
            while not deliver(one, data, extent, 7_000):
                pass

    threads = [threading.Thread(target=work, name="weightstream-test") for _ in range(6)]
    for thread in threads:
        thread.start()
    names = set()
    while one.left:
        target = one.next_ready(1.0)
        assert target is not None, "nothing became ready"
        extent = target.place.info.extent
        assert bytes(one.hand_over(target).tolist()) == data[extent.start : extent.stop]
        one.let_go(target)
        names.add(target.place.name)
    for thread in threads:
        thread.join(5)
    assert len(names) == 40


@pytest.mark.parametrize("in_order", [True, False])
def test_empty_tensors_are_ready_at_once(in_order: bool) -> None:
    data, places = model([0, 0])
    one, _ = staging(places, in_order=in_order)
    assert [take(one, data), take(one, data), take(one, data)] == ["layer.0", "layer.1", None]
