"""One listing under way, and those who wait for it."""

import threading
import time

from weightstream.cachefs.files.entries import Entry


class Flight:
    """Landed when its answer is there, settled when everybody was told what it changed."""

    __slots__ = ("_entries", "_error", "_started_s", "cause", "landed", "path", "settled")

    def __init__(self, path: str) -> None:
        self.path = path
        self.landed = threading.Event()
        self.settled = threading.Event()
        self.cause: Exception | None = None
        """What the origin said, also where an earlier listing covers it."""
        self._entries: tuple[Entry, ...] = ()
        self._error: Exception | None = None
        self._started_s = time.monotonic()

    def age_s(self) -> float:
        """Return for how long it is under way."""
        return time.monotonic() - self._started_s

    def land(
        self,
        entries: tuple[Entry, ...] = (),
        error: Exception | None = None,
        cause: Exception | None = None,
    ) -> None:
        """Give the answer; the first one counts. Under the tree's lock."""
        if not self.landed.is_set():
            self._entries, self._error, self.cause = entries, error, cause
            self.landed.set()

    def result(self) -> tuple[Entry, ...]:
        """Return the answer, or raise it; only after it landed."""
        if self._error is not None:
            raise self._error
        return self._entries
