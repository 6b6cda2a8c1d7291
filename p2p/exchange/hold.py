"""A pause of a node's bulk from the origin, while another node reads what a reader waits for."""

import time

_HOLD_S = 0.15
"""What is on its way when it begins takes 40 ms to drain from a queue of 1 MB at 200 Mbit/s, and a
fault's chunk of 1 MiB 45 ms more. With 0.1 s faults took 0.4 s in the median, with 0.15 0.2."""
_REST_S = 0.1
"""Bulk goes on for so long between two: it has two fifths of the time at worst."""


class Hold:
    """Thread-safe."""

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
