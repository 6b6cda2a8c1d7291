"""Where a swarm's files lie: `STORE/swarm/<a directory of this process>/<blob>`.

Not in the store's own files: what peers send is in a file before it is checked, and a file of the
store holds chunks that nobody checks again.
"""

import fcntl
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from weightstream.errors import StoreError


class Scratch:
    """A directory that is gone with its process; what a killed one left is removed."""

    def __init__(self, store: Path) -> None:
        parent = store / "swarm"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(parent)
            self.path = parent / secrets.token_hex(8)
            self.path.mkdir(mode=0o700)
            self._lock = _locked(self.path)
        except OSError as error:
            raise StoreError(f"cannot use {parent}: {error.strerror}") from error

    def close(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_stale(parent: Path) -> None:
    for path in parent.iterdir():
        with suppress(FileNotFoundError):  # another process removes it
            lock = _locked(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _locked(path: Path) -> int | None:
    """Return a descriptor that holds the directory's lock; None: a process has it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
