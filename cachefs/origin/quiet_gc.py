"""Let the cyclic garbage collector be lazy during a burst of allocations that all stay alive.

botocore parses a few megabytes of JSON into containers when it makes its first client. Every 700
of them start a collection, and those of the oldest generation walk everything that torch made:
0.31-0.44 s for a client, 0.07-0.13 s without. (Right after a `gc.collect()`, as our benchmark
has it before its clock, nothing is due and nothing is gained.) The collector is not switched off:
looking for credentials may take a minute, and the process has other threads.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from weightstream.cachefs.origin.forks import forget_in_child

_LAZY = 100_000


class _Laziness:
    """Counts who wants it: the last one to leave restores the threshold, unless others set it."""

    def __init__(self) -> None:
        self._before: int | None = None
        self.forget()
        forget_in_child(self)

    def forget(self) -> None:
        """Start afresh in a forked child: the thread that would end it does not exist there."""
        self._lock = threading.Lock()
        self._users = 0
        self._restore()

    def begin(self) -> None:
        """Raise the threshold of the youngest generation, for the first user."""
        with self._lock:
            self._users += 1
            first, *others = gc.get_threshold()
            if self._users == 1 and 0 < first < _LAZY:  # 0: switched off by somebody
                self._before = first
                gc.set_threshold(_LAZY, *others)

    def end(self) -> None:
        """Restore the threshold after the last user."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore()

    def _restore(self) -> None:
        before, self._before = self._before, None
        first, *others = gc.get_threshold()
        if before is not None and first == _LAZY:
            gc.set_threshold(before, *others)


_laziness = _Laziness()


@contextmanager
def quiet_gc() -> Iterator[None]:
    """Collect rarely, for all threads, until the last user leaves; then as before."""
    _laziness.begin()
    try:
        yield
    finally:
        _laziness.end()
