"""Byte-range locks between processes that the kernel frees when their holder dies.

Open-file-description locks (F_OFD_SETLK): unlike POSIX record locks they are not lost when another
part of the process closes the same file, and unlike flock() they have ranges. Two traps shape this
module:

* locks of one description never conflict with each other, so threads that share a `LockFile` are
  kept apart by its own set of held bytes, consulted first;
* a forked child shares the parent's description, and as long as the child has it open the parent's
  locks outlive the parent. So the description is used for locks alone (no mmap keeps a duplicate),
  and the child closes it at once and opens its own when it next needs a lock.
"""

import errno
import fcntl
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from weightstream.cachefs.store.files import OpenFile, store_errors
from weightstream.errors import StoreError

# struct flock of 64-bit Linux: type, whence, start, len, pid (0 for OFD locks); 32 bytes.
_FLOCK = struct.Struct("hhqqi0q")
_CONFLICT = frozenset({errno.EAGAIN, errno.EACCES})
_POLL_MIN_S = 0.001
_POLL_MAX_S = 0.02


class Forkable(Protocol):
    """Has state that a forked child must not share with its parent."""

    def after_fork_in_child(self) -> None:
        """Make the object usable in the child; no other thread runs."""
        ...


_forkables: "weakref.WeakSet[Forkable]" = weakref.WeakSet()


def survive_fork(what: Forkable) -> None:
    """Have `what.after_fork_in_child()` called in every forked child, as long as it lives."""
    _forkables.add(what)


def _after_fork_in_child() -> None:
    for what in list(_forkables):
        what.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


class LockFile:
    """Locks on single bytes of one file; the bytes need not exist. Thread-safe."""

    def __init__(self, path: Path, writable: bool = True, create: bool = False) -> None:
        self._path = path
        self._flags = os.O_RDWR if writable else os.O_RDONLY
        self._mutex = threading.Lock()
        self._file: OpenFile | None = OpenFile(path, self._flags | (os.O_CREAT if create else 0))
        self._identity = _identity(self._file)
        self._held: set[int] = set()
        self._shared: set[int] = set()
        survive_fork(self)

    def file(self) -> OpenFile:
        """Return the description; in a forked child a new one, with the shared locks again."""
        with self._mutex:
            return self._current()

    def _current(self) -> OpenFile:
        if self._file is None:
            file = OpenFile(self._path, self._flags)
            if _identity(file) != self._identity:
                raise OSError(errno.ESTALE, "removed from the store while in use")
            for byte in self._shared:
                _set_lock(file, fcntl.F_RDLCK, byte)
            self._file = file
        return self._file

    def try_lock(self, byte: int, shared: bool = False) -> bool:
        """Take the lock of `byte` unless another thread or process has it; never waits."""
        with self._mutex, store_errors(f"lock {self._path}"):
            if byte in self._held:
                return False
            if not _set_lock(self._current(), fcntl.F_RDLCK if shared else fcntl.F_WRLCK, byte):
                return False
            (self._shared if shared else self._held).add(byte)
            return True

    def unlock(self, byte: int) -> None:
        """Give the lock of `byte` back; nothing happens when it is not held."""
        with self._mutex, store_errors(f"unlock {self._path}"):
            if byte in self._held or byte in self._shared:
                self._held.discard(byte)
                self._shared.discard(byte)
                _set_lock(self._current(), fcntl.F_UNLCK, byte)

    def taken_elsewhere(self, byte: int) -> bool:
        """Say whether another description has any lock on `byte`."""
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        with self._mutex, store_errors(f"query the locks of {self._path}"):
            answer = fcntl.fcntl(self._current().fileno(), fcntl.F_OFD_GETLK, request)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    @contextmanager
    def hold(self, byte: int, timeout_s: float, shared: bool = False) -> Iterator[None]:
        """Hold the lock of `byte`, or raise `StoreError` when it is not free within `timeout_s`."""
        self.wait(byte, timeout_s, shared)
        try:
            yield
        finally:
            self.unlock(byte)

    def wait(self, byte: int, timeout_s: float, shared: bool = False) -> None:
        """Take the lock of `byte`, polling: a blocking fcntl could not be given a deadline."""
        deadline_s = time.monotonic() + timeout_s
        pause_s = _POLL_MIN_S
        while not self.try_lock(byte, shared):
            if time.monotonic() > deadline_s:
                raise StoreError(f"cannot lock {self._path}: held for over {timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _POLL_MAX_S)

    def close(self) -> None:
        """Free every lock, once no thread is inside a call; a later call opens the file again."""
        with self._mutex:
            self._file = None
            self._held.clear()
            self._shared.clear()

    def after_fork_in_child(self) -> None:
        """Let go of the parent's description without unlocking anything of the parent's."""
        self._mutex = threading.Lock()
        self._held.clear()
        if self._file is not None:
            self._file.close_now()
            self._file = None


def _identity(file: OpenFile) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _set_lock(file: OpenFile, kind: int, byte: int) -> bool:
    request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in _CONFLICT:
            return False
        raise
    return True
