"""Reusable page-aligned buffers for bytes that have no home of their own yet.

A slab is charged to the memory budget from its allocation until it is freed, idle time in the pool
included; idle slabs make room as soon as another size is wanted, and all go when the engine idles.
Reuse is the point: a slab that was touched before costs no page zeroing.
"""

import mmap
import threading
from collections.abc import Callable

from weightstream.cachefs.fetch.budget import MemoryBudget
from weightstream.cachefs.fetch.memory import allocate, populate, round_up

_CLASS_BYTES = 1 << 20


class Slab:
    """A lease on pooled memory. `view` is exactly what was asked for; starts on a page."""

    def __init__(self, pool: "SlabPool", memory: mmap.mmap, count: int) -> None:
        self.memory = memory
        self.view = memoryview(memory)[:count]
        self._pool = pool
        self._holds = 1
        self._lock = threading.Lock()

    @property
    def is_shared(self) -> bool:
        """Say whether more than one user holds the slab."""
        return self._holds > 1

    def hold(self) -> None:
        """Keep the slab for one more user."""
        with self._lock:
            self._holds += 1

    def release(self) -> None:
        """Say that one user is done; the last one gives the slab back."""
        with self._lock:
            self._holds -= 1
            last = self._holds == 0
        if last:
            self.view.release()
            self._pool._give_back(self.memory)


class SlabPool:
    """Slabs by size class, charged to one budget; thread-safe, never blocks."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._lock = threading.Lock()
        self.on_release: Callable[[], None] = lambda: None

    def try_take(self, count: int) -> Slab | None:
        """Return a slab of `count` bytes, or None when the budget has no room for it now."""
        size = round_up(max(count, 1), _CLASS_BYTES)
        with self._lock:
            memory = self._reuse(size) or self._allocate(size)
        return Slab(self, memory, count) if memory is not None else None

    def trim(self) -> None:
        """Free every idle slab."""
        with self._lock:
            while self._drop_one():
                pass

    def _reuse(self, size: int) -> mmap.mmap | None:
        idle = self._idle.get(size)
        return idle.pop() if idle else None

    def _allocate(self, size: int) -> mmap.mmap | None:
        while not self._budget.try_acquire(size):
            if not self._drop_one():
                return None
        try:
            memory = allocate(size)
            populate(memoryview(memory))  # here the cheaper page size is learnt, for tensors too
            return memory
        except BaseException:
            self._budget.release(size)
            raise

    def _drop_one(self) -> bool:
        for idle in self._idle.values():
            if idle:
                memory = idle.pop()
                self._budget.release(len(memory))
                return True
        return False

    def _give_back(self, memory: mmap.mmap) -> None:
        with self._lock:
            self._idle.setdefault(len(memory), []).append(memory)
        self.on_release()
