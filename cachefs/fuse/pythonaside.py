"""The thread of a libfuse mount that unlinks names whose object was replaced while it was open.

It calls unlink(2) on the mount like any process. That takes the lock of the folder, which whoever
looks a name up in it has until he is answered; so it must never be a thread that answers.
"""

import errno
import logging
import os
import threading
from collections.abc import Mapping
from queue import SimpleQueue

from weightstream.cachefs.fuse.mount_table import mounted_at

log = logging.getLogger(__name__)


class Aside:
    """A queue of paths and its thread, which begins with the first."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: set[str] = set()
        self._thread: threading.Thread | None = None

    def put(self, path: str) -> None:
        """Have a path unlinked soon; returns at once."""
        with self._lock:
            if path in self._waiting:
                return
            self._waiting.add(path)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, daemon=True, name="weightstream-aside"
                )
                self._thread.start()
        self._queue.put(path)

    def is_asking(self, context: Mapping[str, int]) -> bool:
        """Say whether a request is our thread's own: its `pid` is the thread's."""
        thread = self._thread
        return thread is not None and context["pid"] == thread.native_id

    def close(self) -> None:
        """Let the thread end after what it does."""
        self._queue.put(None)

    def _run(self) -> None:
        while (path := self._queue.get()) is not None:
            with self._lock:
                self._waiting.discard(path)
            try:
                self._unlink(path)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    log.warning("%s was replaced, but stays what it was: %s", path, error.strerror)

    def _unlink(self, path: str) -> None:
        """Unlink a path of the mount, and never one of what lies below it after an unmount."""
        root = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _is_ours(root, self._directory):
                return
            os.unlink(path, dir_fd=root)
        finally:
            os.close(root)


def _is_ours(root: int, directory: str) -> bool:
    """Say whether a descriptor is of a mount of weightstream's, at its root."""
    found = mounted_at(directory)
    return found is not None and found.is_ours and os.fstat(root).st_dev == _device(found.device)


def _device(text: str) -> int:
    major, _, minor = text.partition(":")
    return os.makedev(int(major), int(minor))
