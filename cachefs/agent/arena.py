"""Memory that the agent shares with its clients: bytes cross a process border without the kernel.

A memfd, cut into slots as long as the longest range. A slot is charged to the memory budget from
its first use until it has been idle for a while; the last one that was freed is the first to be
used again, for its bytes are still in the processor's cache. Clients get a descriptor with which
they can read and not write; the size is sealed, so no mapping of it can be cut short.
"""

import fcntl
import mmap
import os
import threading
import time
from contextlib import suppress

from weightstream.cachefs.fetch.budget import MemoryBudget
from weightstream.cachefs.fetch.memory import HUGE_PAGE_BYTES, round_up

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Slot:
    """One range's worth of the arena."""

    def __init__(self, arena: "Arena", offset: int, view: memoryview) -> None:
        self.offset = offset
        self.view = view
        self._arena = arena

    def release(self) -> None:
        """Say that nobody reads or writes it any more."""
        self._arena._give_back(self)


class Arena:
    """Slots of shared memory; thread-safe."""

    def __init__(self, budget: MemoryBudget, slot_bytes: int) -> None:
        self.slot_bytes = round_up(slot_bytes, HUGE_PAGE_BYTES)
        self._budget = budget
        self._unused = max(1, budget.limit_bytes // 2 // self.slot_bytes)
        size_bytes = self._unused * self.slot_bytes
        writable = os.memfd_create("weightstream-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(writable, size_bytes)
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = mmap.mmap(writable, size_bytes)
            self.descriptor = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(writable)
        with suppress(OSError):  # where shared memory has no huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._offsets = iter(range(0, size_bytes, self.slot_bytes))
        self._dry: list[Slot] = []  # without pages
        self._idle: list[tuple[float, Slot]] = []
        self._freed = threading.Condition()

    def take(self, patience_s: float) -> Slot | None:
        """Return a slot, or None when there was none in all that time."""
        until_s = time.monotonic() + patience_s
        with self._freed:
            while (slot := self._try_take()) is None:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return None
                self._freed.wait(min(left_s, 0.1))  # the budget is others' too: look again
            return slot

    def trim(self, idle_s: float = 0.0) -> None:
        """Give back the memory of slots that nobody has used for so long."""
        with self._freed:
            limit_s = time.monotonic() - idle_s
            old = [slot for since_s, slot in self._idle if since_s <= limit_s]
            self._idle = [(since_s, slot) for since_s, slot in self._idle if since_s > limit_s]
            for slot in old:
                self._memory.madvise(mmap.MADV_REMOVE, slot.offset, self.slot_bytes)
                self._budget.release(self.slot_bytes)
                self._dry.append(slot)

    def close(self) -> None:
        """Close the descriptor; what is mapped stays until the last slot is dropped."""
        self.trim()
        os.close(self.descriptor)

    def _try_take(self) -> Slot | None:
        if self._idle:
            return self._idle.pop()[1]
        if not (self._dry or self._unused) or not self._budget.try_acquire(self.slot_bytes):
            return None
        if self._dry:
            return self._dry.pop()
        self._unused -= 1
        offset = next(self._offsets)
        return Slot(self, offset, memoryview(self._memory)[offset : offset + self.slot_bytes])

    def _give_back(self, slot: Slot) -> None:
        with self._freed:
            self._idle.append((time.monotonic(), slot))
            self._freed.notify()
