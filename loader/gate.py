"""How much may be fetched ahead of the consumer: the bound on a stream's memory.

Counted are the wanted bytes that are in flight, or have landed and were not handed over, and the
tensor that the consumer works on until it comes back for the next one. Up to half of the memory
budget is for them; the other half stays for the slabs they travel in, so that one stream cannot
starve its own transport. They are charged to the budget as well, where several streams and the
write-back meet.

One rule keeps it moving: while the consumer starves, the bytes of the tensor it waits for are let
through whatever the count says. So a tensor larger than the budget arrives, and two streams that
together hold the whole budget both go on, one tensor at a time.
"""

import threading
from typing import Protocol


class Budget(Protocol):
    """The engine's memory budget."""

    @property
    def limit_bytes(self) -> int:
        """Return the most that may be charged."""
        ...

    def try_acquire(self, count: int) -> bool:
        """Charge, or refuse."""
        ...

    def release(self, count: int) -> None:
        """Take a charge back."""
        ...


class Gate:
    """Thread-safe."""

    def __init__(self, budget: Budget) -> None:
        self.limit_bytes = budget.limit_bytes // 2
        self.held_bytes = 0
        self._charged_bytes = 0
        self._budget = budget
        self._refused = False
        self._lock = threading.Lock()

    def admit(self, count: int, *, starving: bool) -> bool:
        """Let `count` wanted bytes in, or refuse them for now."""
        with self._lock:
            fits = self.held_bytes + count <= self.limit_bytes
            charged = fits and self._budget.try_acquire(count)
            if not charged and not starving:
                self._refused = True
                return False
            self._charged_bytes += count if charged else 0
            self.held_bytes += count
            return True

    def let_go(self, count: int) -> bool:
        """Hear that `count` bytes are not held any more; True when somebody waits for room."""
        with self._lock:
            refused, self._refused = self._refused, False
            self.held_bytes -= count
            # What was let in over the limit was not charged; the charge goes last.
            surplus = max(0, self._charged_bytes - max(0, self.held_bytes))
            self._charged_bytes -= surplus
        if surplus:
            self._budget.release(surplus)
        return refused

    def close(self) -> None:
        """Give every charge back."""
        with self._lock:
            charged, self._charged_bytes, self.held_bytes = self._charged_bytes, 0, 0
        if charged:
            self._budget.release(charged)
