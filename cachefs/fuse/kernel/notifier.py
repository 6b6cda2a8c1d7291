"""What the kernel is told unasked, by a thread that serves no request.

INVAL_ENTRY takes the lock of the folder that it is about, and whoever looks a name up in this
folder has that lock until his question is answered. A notification from a thread that answers
would wait for itself. And one about a folder that has to be listed first would wait for the
origin, in a state that not even SIGKILL ends; so names are invalidated only in folders whose
listing is fresh, where every question is answered at once. In others the kernel's own time for the
entry has run out.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from errno import ECONNABORTED, ENODEV, ENOENT, ENOTDIR
from queue import Empty, SimpleQueue
from typing import TypeAlias

from weightstream.cachefs.files.entries import Change
from weightstream.cachefs.fuse.kernel import nodes, wire
from weightstream.cachefs.fuse.kernel.connection import Connection
from weightstream.cachefs.fuse.kernel.protocol import Notify

log = logging.getLogger(__name__)

_BATCH = 64
_GATHER_S = 0.010


@dataclass(frozen=True, slots=True)
class Listing:
    """A folder has other children now."""

    folder: str


@dataclass(frozen=True, slots=True, eq=False)
class Marker:
    """All news before it has been told."""

    reached: threading.Event


News: TypeAlias = Change | Listing | Marker


class Notifier:
    """A queue and its thread, which begins with the first news and ends with the process."""

    def __init__(self, connection: Connection, is_fresh: Callable[[str], bool]) -> None:
        self._connection = connection
        self._is_fresh = is_fresh
        self._queue: SimpleQueue[News] = SimpleQueue()
        self._lock = threading.Lock()
        self._is_started = False
        self._is_disarmed = False

    def tell(self, news: Iterable[News]) -> None:
        """Have the kernel told soon; returns at once."""
        for one in news:
            self._queue.put(one)
        with self._lock:
            if not self._is_started and not self._is_disarmed:
                self._is_started = True
                threading.Thread(target=self._run, daemon=True, name="weightstream-notify").start()

    def settle(self, longest_s: float) -> bool:
        """Wait until the kernel has been told everything; False when that takes too long."""
        marker = Marker(threading.Event())
        self.tell([marker])
        return marker.reached.wait(longest_s)

    def disarm(self) -> None:
        """Say nothing from now on: a server that ends must not begin to wait for the kernel."""
        self._is_disarmed = True

    def _run(self) -> None:
        while True:
            for news in self._gather():
                if self._is_disarmed:
                    return
                self._say(news)

    def _gather(self) -> list[News]:
        """Return what comes within 10 ms of the first, each once: a refresh changes many names."""
        batch = {self._queue.get(): None}
        until_s = time.monotonic() + _GATHER_S
        while len(batch) < _BATCH and (left_s := until_s - time.monotonic()) > 0:
            try:
                batch[self._queue.get(timeout=left_s)] = None
            except Empty:
                break
        return list(batch)

    def _say(self, news: News) -> None:
        match news:
            case Change(folder, name):
                if self._is_fresh(folder):
                    self._send(Notify.INVAL_ENTRY, wire.inval_entry(nodes.folder_id(folder), name))
            case Listing(folder):
                self._send(Notify.INVAL_INODE, wire.inval_inode(nodes.folder_id(folder)))
            case Marker(reached):
                reached.set()

    def _send(self, code: Notify, payload: bytes) -> None:
        try:
            self._connection.notify(code, payload)
        except OSError as error:
            # ENOENT: the kernel did not know it anyway; ENODEV: unmounted
            if error.errno not in (ENOENT, ENOTDIR, ENODEV, ECONNABORTED):
                log.warning("%s was refused: %s", code.name, error.strerror)
