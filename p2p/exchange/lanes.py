"""Faults before bulk, at the sender and at the receiver, and at the origin: see `Hold`.

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
_PAUSE_S, _STEP_S = 0.15, 0.1
"""How long bulk pauses from a fault's beginning, and from each piece of it on. A fault whose bytes
come slowly does so for another reason than bulk here: with pauses of up to a second for each, a
node with faults that nobody held was done after 1.45 to 1.61 of the bound, with these after 1.18 to
1.24 (8 nodes, three runs each, interleaved)."""

_LONGEST_S = 1.0
"""Whoever waits for a piece of bulk gives its sender up after two seconds."""

_HOLD_S = 0.12
"""What is on its way when it begins takes 40 ms to drain from a queue of 1 MB at 200 Mbit/s, and a
fault's chunk of 1 MiB 45 ms more. With 0.1 s faults took 0.24 s in the median and bulk 1.18 of the
bound, with 0.12 0.24 and 1.19, with 0.15 0.22 and 1.22; in one bad hour with 0.1 0.29 and 1.20,
with 0.15 0.22 and 1.20."""
_REST_S = 0.1
"""Bulk goes on for so long between two: it has nearly half of the time at worst."""


class Lanes:
    """Two lanes; thread-safe."""

    def __init__(self) -> None:
        self._faults = 0
        self._last_s = self._until_s = float("-inf")
        self._changed = threading.Condition()

    @contextmanager
    def fault(self) -> Iterator[None]:
        """Hold bulk up while the block runs, for a moment; longer as long as it `moves`."""
        with self._changed:
            self._faults += 1
            self._last_s = time.monotonic()
            self._until_s = max(self._until_s, self._last_s + _PAUSE_S)
        try:
            yield
        finally:
            with self._changed:
                self._faults -= 1
                self._changed.notify_all()

    def moves(self) -> None:
        """Say that a piece of a fault has come or gone."""
        self._until_s = max(self._until_s, time.monotonic() + _STEP_S)

    @property
    def sees_faults(self) -> bool:
        """Say that there was one lately: more are going to come."""
        return time.monotonic() - self._last_s < _LATELY_S

    def give_way(self) -> None:
        """Wait while a fault's bytes move, whatever comes a second at most."""
        longest_s = time.monotonic() + _LONGEST_S
        while self._faults and (left_s := min(self._until_s, longest_s) - time.monotonic()) > 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._faults, left_s)


class Hold:
    """A pause of this node's bulk from the origin, while another node reads a fault.

    Thread-safe; see `holding`."""

    def __init__(self) -> None:
        self._until_s = float("-inf")

    def begin(self) -> bool:
        """Hold, unless the last one was a moment ago: say whether."""
        now_s = time.monotonic()
        is_due = now_s > self._until_s + _REST_S
        if is_due:
            self._until_s = now_s + _HOLD_S
        return is_due

    def wait(self) -> None:
        """Wait until it is over."""
        left_s = self._until_s - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
