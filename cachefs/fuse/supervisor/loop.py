"""An event loop of one thread in a page: descriptors, timers, signals.

Not asyncio, which costs 9 MiB (measured, Python 3.11) of a process that should cost 15. Descriptors
come before timers in each round, so that what has arrived is seen before somebody is judged for
not having sent it.
"""

import heapq
import itertools
import os
import select
import signal
import time
from collections.abc import Callable

Handler = Callable[[int], None]

READABLE = select.POLLIN
WRITABLE = select.POLLOUT


class Timer:
    """Something to be done later; `cancel` is allowed at any time."""

    __slots__ = ("at_s", "what")

    def __init__(self, at_s: float, what: Callable[[], None]) -> None:
        self.at_s = at_s
        self.what: Callable[[], None] | None = what

    def cancel(self) -> None:
        """Do not do it, nor keep what it refers to."""
        self.what = None


class Loop:
    """Calls handlers until `stop`. Not thread-safe, and needs not be."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._exit_code: int | None = None

    def watch(self, descriptor: int, handler: Handler, events: int = READABLE) -> None:
        """Call the handler with the events of a descriptor, or other events from now on."""
        self._handlers[descriptor] = handler
        self._poll.register(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Watch a descriptor no more; to be called before it is closed."""
        if self._handlers.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def after(self, delay_s: float, what: Callable[[], None]) -> Timer:
        """Call `what` once, later."""
        timer = Timer(time.monotonic() + delay_s, what)
        heapq.heappush(self._timers, (timer.at_s, next(self._order), timer))
        return timer

    def on_signals(self, signals: set[signal.Signals], handler: Callable[[int], None]) -> None:
        """Call the handler with the number of a signal, in the loop and not in the middle of it."""
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in signals:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

        def arrived(_: int) -> None:
            for number in os.read(read, 64):
                handler(number)

        self.watch(read, arrived)

    def stop(self, exit_code: int) -> None:
        """End `run` after this round; the first caller says with what."""
        if self._exit_code is None:
            self._exit_code = exit_code

    def run(self) -> int:
        """Run until `stop`; return its exit code."""
        while self._exit_code is None:
            for descriptor, events in self._poll.poll(self._wait_ms()):
                handler = self._handlers.get(descriptor)
                if handler is not None:  # one before it in this round may have ended it
                    handler(events)
            self._run_timers()
        return self._exit_code

    def _wait_ms(self) -> float | None:
        while self._timers and self._timers[0][2].what is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic()) * 1000

    def _run_timers(self) -> None:
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            timer = heapq.heappop(self._timers)[2]
            what, timer.what = timer.what, None
            if what is not None:
                what()
