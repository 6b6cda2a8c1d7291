"""Descriptors that live as long as somebody uses them, and the disk's errors in our words.

A blob may be closed while a worker thread is still inside `pwrite` on it. If close() closed the
number, the kernel could hand the same number to another file and the write would land there. So a
descriptor belongs to an object, every operation holds a reference for its duration, and the number
is closed when the last reference goes.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weightstream.errors import StoreError, StoreFullError, StoreReadOnlyError

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


class OpenFile:
    """One open file description, closed with its last reference."""

    __slots__ = ("__weakref__", "_fd", "path")

    def __init__(self, path: Path, flags: int, mode: int = FILE_MODE) -> None:
        self._fd = -1
        self.path = path
        self._fd = os.open(path, flags | os.O_CLOEXEC, mode)

    def fileno(self) -> int:
        """Return the descriptor; valid while this object is referenced."""
        return self._fd

    def close_now(self) -> None:
        """Close whoever has references: for a forked child, which has one thread."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._fd >= 0:
            close(self._fd)


def read_ahead(fd: int) -> None:
    """Have the kernel read twice as far ahead, as it is for weights: torch's own mapping says so.

    The mapping of an evicted 2 GiB: 0.86 s and 0.33 CPU s instead of 0.90 and 0.55. Asking for all
    of it at once from a thread (POSIX_FADV_WILLNEED) was slower, 1.1-1.4 s: the two get in each
    other's way at the page cache. MADV_SEQUENTIAL would also have pages dropped early that other
    processes share.
    """
    with suppress(OSError):  # a hint; not every file system takes it
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def store_error(doing: str, error: OSError) -> StoreError:
    """Return the error of our tree for what the disk said while `doing`."""
    kind: type[StoreError] = StoreError
    if error.errno in _FULL:
        kind = StoreFullError
    elif error.errno in _READ_ONLY:
        kind = StoreReadOnlyError
    return kind(f"cannot {doing}: {error.strerror or error}")


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Raise what the disk says inside as a `StoreError` that tells what was being done."""
    try:
        yield
    except OSError as error:
        raise store_error(doing, error) from error


def fsync_directory(path: Path) -> None:
    """Make the names in a directory survive a power loss."""
    directory = OpenFile(path, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(directory.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a small file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        file = OpenFile(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        write_fully(file.fileno(), memoryview(content), 0)
        os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_fully(fd: int, data: memoryview, offset: int) -> None:
    """`pwrite` until everything is written."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def read_fully(fd: int, into: memoryview, offset: int) -> bool:
    """`preadv` until `into` is full; False when the file ends before."""
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True
