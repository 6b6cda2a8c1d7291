"""Faults before bulk, at the sender and at the receiver.

A reader that waits for one chunk must not queue behind the gigabytes of a load. So as long as a
fault's bytes are going out (or coming in), bulk pauses between two pieces. Only while bytes move:
a fault that waits for its bytes holds nobody up, or the bulk that has to bring them would wait for
the fault that waits for it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LATELY_S = 10.0
_LONGEST_S = 1.0
"""A pause ends after this long whatever the fault does: a stuck one must not stop the load."""


class Lanes:
    """Two lanes; thread-safe."""

    def __init__(self) -> None:
        self._faults = 0
        self._last_s = float("-inf")
        self._changed = threading.Condition()

    @contextmanager
    def fault(self) -> Iterator[None]:
        """Hold bulk up while the block runs."""
        with self._changed:
            self._faults += 1
            self._last_s = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._faults -= 1
                self._changed.notify_all()

    @property
    def sees_faults(self) -> bool:
        """Say that there was one lately: more are going to come."""
        return time.monotonic() - self._last_s < _LATELY_S

    def give_way(self) -> None:
        """Wait until no fault's bytes move."""
        if self._faults:
            with self._changed:
                self._changed.wait_for(lambda: not self._faults, _LONGEST_S)
