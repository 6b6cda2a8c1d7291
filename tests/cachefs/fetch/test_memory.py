"""Budget and slabs: what is charged is given back, and nothing blocks."""

import ctypes
import mmap
from pathlib import Path

from weightstream.cachefs.fetch import budget
from weightstream.cachefs.fetch.budget import MemoryBudget, budget_bytes, memory_bytes
from weightstream.cachefs.fetch.memory import (
    PAGE_BYTES,
    PageCosts,
    allocate,
    populate,
    release_pages,
)
from weightstream.cachefs.fetch.slabs import SlabPool

MIB = 1 << 20


def test_the_limit_refuses_and_release_makes_room() -> None:
    memory = MemoryBudget(10 * MIB)
    assert memory.try_acquire(6 * MIB)
    assert not memory.try_acquire(6 * MIB)
    memory.release(6 * MIB)
    assert memory.try_acquire(6 * MIB)


def test_an_idle_budget_grants_one_request_of_any_size() -> None:
    assert MemoryBudget(MIB).try_acquire(100 * MIB)


def test_the_default_is_an_eighth_of_the_memory_and_at_most_four_gib() -> None:
    assert budget_bytes(0) == max(64 * MIB, min(4 << 30, memory_bytes() // 8))
    assert budget_bytes(123) == 123


def test_the_lowest_cgroup_limit_on_the_path_counts(tmp_path: Path) -> None:
    own = Path("/proc/self/cgroup").read_text().splitlines()[0].split(":", 2)[2].lstrip("/")
    (tmp_path / own).mkdir(parents=True, exist_ok=True)
    (tmp_path / own / "memory.max").write_text("max\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert 1000000 in budget._cgroup_limits(tmp_path) or own == ""


def test_slabs_are_reused_and_trimmed() -> None:
    memory = MemoryBudget(10 * MIB)
    pool = SlabPool(memory)
    slab = pool.try_take(3 * MIB)
    assert slab is not None
    first = slab.memory
    slab.release()
    again = pool.try_take(3 * MIB)
    assert again is not None
    assert again.memory is first
    again.release()
    pool.trim()
    assert memory.used_bytes == 0


def test_idle_slabs_make_room_for_another_size() -> None:
    pool = SlabPool(MemoryBudget(10 * MIB))
    small = pool.try_take(6 * MIB)
    assert small is not None
    small.release()
    assert pool.try_take(8 * MIB) is not None


def test_no_room_is_none_not_a_wait() -> None:
    pool = SlabPool(MemoryBudget(10 * MIB))
    held = pool.try_take(6 * MIB)
    assert held is not None
    assert pool.try_take(6 * MIB) is None


def test_a_held_slab_stays_until_its_last_user() -> None:
    pool = SlabPool(MemoryBudget(10 * MIB))
    slab = pool.try_take(4 * MIB)
    assert slab is not None
    slab.hold()
    slab.release()
    slab.view[:4] = b"kept"
    assert bytes(slab.view[:4]) == b"kept"
    slab.release()


def test_released_pages_leave_their_neighbours_alone() -> None:
    memory = allocate(4 * PAGE_BYTES)
    memory[:] = b"x" * len(memory)
    release_pages(memory, PAGE_BYTES // 2, 3 * PAGE_BYTES + 1)
    assert memory[:PAGE_BYTES] == b"x" * PAGE_BYTES
    assert memory[PAGE_BYTES : 3 * PAGE_BYTES] == bytes(2 * PAGE_BYTES)
    assert memory[3 * PAGE_BYTES :] == b"x" * PAGE_BYTES


def test_huge_pages_are_used_until_they_prove_dearer() -> None:
    costs = PageCosts()
    assert costs.prefers_huge
    costs = costs.after(huge=True, seconds=3e-3).after(huge=False, seconds=0.8e-3)
    assert not costs.prefers_huge


def test_the_cheaper_size_wins_back() -> None:
    costs = PageCosts(huge_s=3e-3, small_s=0.8e-3)
    for _ in range(6):
        costs = costs.after(huge=True, seconds=0.2e-3)
    assert costs.prefers_huge


def test_both_sizes_are_timed_at_first_and_now_and_then() -> None:
    due = [calls for calls in range(100) if PageCosts(calls=calls).is_due]
    assert due == [0, 32, 64, 96]


def test_populated_memory_is_there_and_keeps_its_bytes() -> None:
    memory = allocate(16 * MIB)
    memory[5 * MIB : 5 * MIB + 4] = b"kept"
    before = resident_pages(memory)
    populate(memoryview(memory)[: 12 * MIB])
    assert resident_pages(memory) >= 12 * MIB // PAGE_BYTES > before
    assert memory[5 * MIB : 5 * MIB + 4] == b"kept"


def resident_pages(memory: mmap.mmap) -> int:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    flags = (ctypes.c_ubyte * (len(memory) // PAGE_BYTES))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), flags) == 0
    return sum(flag & 1 for flag in flags)
