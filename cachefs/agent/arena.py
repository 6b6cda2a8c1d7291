"""Memory that the agent shares with its clients: bytes cross a process border without the kernel.

A memfd, cut into slots as long as the longest range. A slot is charged to the memory budget from
its first use until it has been idle for a while, a few from the start and for good; the last one
that was freed is the first to be used again, for its bytes are still in the processor's cache.
Clients get a descriptor with which they can read and not write; the size is sealed, so no mapping
of it can be cut short.
"""

import ctypes
import fcntl
import mmap
import os
import threading
import time

from weightstream.cachefs.fetch.budget import MemoryBudget
from weightstream.cachefs.fetch.memory import HUGE_PAGE_BYTES, round_up

_MADV_POPULATE_WRITE = 23
_WARM_SHARE = 8
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _madvise(address: int, count: int, advice: int) -> None:
    """Advise the kernel with the interpreter lock released, which `mmap.madvise` would hold.

    An advice that this kernel does not know changes nothing.
    """
    _libc.madvise(address, count, advice)


class Slot:
    """One range's worth of the arena."""

    def __init__(self, arena: "Arena", offset: int, view: memoryview) -> None:
        self.offset = offset
        self.view = view
        self.is_dry = True
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
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        _madvise(self._address, size_bytes, mmap.MADV_HUGEPAGE)  # where shared memory has those
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
        return self._wet(slot)

    def warm(self, warm_bytes: int) -> None:
        """Fault in as many slots as `trim` would keep, so that the first load finds them."""
        slots = [self.take(0.0) for _ in range(self._kept_slots(warm_bytes))]
        for slot in slots:
            if slot is not None:
                slot.release()

    def trim(self, idle_s: float = 0.0, warm_bytes: int = 0) -> None:
        """Give back the memory of slots that nobody has used for so long, but for some."""
        with self._freed:
            limit_s = time.monotonic() - idle_s
            old = [one for one in self._idle if one[0] <= limit_s]
            old = old[: max(0, len(self._idle) - self._kept_slots(warm_bytes))]
            self._idle = self._idle[len(old) :]
        for _, slot in old:
            _madvise(self._address + slot.offset, self.slot_bytes, mmap.MADV_REMOVE)
            slot.is_dry = True
        with self._freed:
            self._budget.release(len(old) * self.slot_bytes)
            self._dry += [slot for _, slot in old]

    def close(self) -> None:
        """Close the descriptor; what is mapped stays until the last slot is dropped."""
        self.trim()
        os.close(self.descriptor)

    def _kept_slots(self, warm_bytes: int) -> int:
        return min(warm_bytes, self._budget.limit_bytes // _WARM_SHARE) // self.slot_bytes

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

    def _wet(self, slot: Slot) -> Slot:
        """Fault a slot's pages in by one call; does nothing where the kernel cannot."""
        if slot.is_dry:
            _madvise(self._address + slot.offset, self.slot_bytes, _MADV_POPULATE_WRITE)
            slot.is_dry = False
        return slot

    def _give_back(self, slot: Slot) -> None:
        with self._freed:
            self._idle.append((time.monotonic(), slot))
            self._freed.notify()
