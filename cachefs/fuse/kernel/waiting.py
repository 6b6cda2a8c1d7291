"""Requests that are not answered at once: who may answer them, interrupts and deadlines.

A request that waits is in one table, by its unique number. Whoever takes it out of the table
answers it: the worker that has the result, an INTERRUPT, or the deadline. So each is answered
once, without a lock of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class Interruptible(Protocol):
    """A request in the table."""

    overdue_s: float | None
    """When, by the monotonic clock, it must be answered; None where something else sees to it."""

    def interrupt(self) -> None:
        """Answer EINTR, unless it is answered by now."""

    def expire(self) -> None:
        """Answer EIO, unless it is answered by now."""


class Waiting:
    """The table. Thread-safe: every operation is one on a dict."""

    def __init__(self) -> None:
        self._by_unique: dict[int, Interruptible] = {}

    def __len__(self) -> int:
        return len(self._by_unique)

    def add(self, unique: int, one: Interruptible) -> None:
        """Let a request wait."""
        self._by_unique[unique] = one

    def take(self, unique: int) -> bool:
        """Say whether the caller is the one who answers."""
        return self._by_unique.pop(unique, None) is not None

    def interrupt(self, unique: int) -> bool:
        """End a request that waits; False when none of this number is known."""
        one = self._by_unique.get(unique)
        if one is None:
            return False
        one.interrupt()
        return True

    def expire(self, now_s: float) -> None:
        """End what has waited for too long."""
        for one in list(self._by_unique.values()):
            if one.overdue_s is not None and one.overdue_s <= now_s:
                one.expire()


@dataclass(slots=True, eq=False)
class Deferred:
    """A request whose answer is worked out elsewhere."""

    waiting: Waiting
    unique: int
    limit_s: float
    on_interrupt: Callable[[], None]
    on_expiry: Callable[[], None]
    overdue_s: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.overdue_s = time.monotonic() + self.limit_s
        self.waiting.add(self.unique, self)

    def interrupt(self) -> None:
        """Answer EINTR; the work goes on for others, or for nothing."""
        if self.waiting.take(self.unique):
            self.on_interrupt()

    def expire(self) -> None:
        """Answer EIO."""
        if self.waiting.take(self.unique):
            self.on_expiry()
