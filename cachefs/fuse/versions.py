"""Which version of a file each path of a libfuse mount stands for.

libfuse names files by path and gives the kernel one inode per path, with one page cache. When an
object is replaced while its file is open, that inode must stay the old version's, or pages of both
would mix; the new version needs an inode of its own. libfuse gives it one as soon as the path was
unlinked: it renames a file that is open to a hidden name, as every Unix would keep it alive, and
unlinks that when the last handle is closed. So:

    shown ──replaced, nobody has it open──> shown (the next open drops the kernel's pages)
      └────replaced, while open──> overtaken ──unlink(path), by us──> aside ──last close──> gone

An overtaken path goes on being the old version until our own unlink arrives, a moment later: at no
time does a path answer with one version what was asked about another. `Aside` (pythonaside.py)
sends the unlinks; those of others are refused, this is a read-only file system.

Lock: one, held for dictionary operations only.
"""

import errno
import os
import threading
from dataclasses import dataclass

from weightstream.cachefs.files.entries import Entry, File

HIDDEN = ".fuse_hidden"  # what libfuse's names for open files that were unlinked begin with


@dataclass(slots=True, eq=False)
class Shown:
    """What the kernel was told that a path is."""

    file: File
    opens: int = 0
    is_cached: bool = False  # the kernel may hold pages of this version


class Versions:
    """The files that the kernel has heard of, by path. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown: dict[str, Shown] = {}
        self._aside: dict[str, Shown] = {}

    def show(self, path: str, now: Entry | None) -> Entry | None:
        """Return what to say that a path is, where the tree says `now`."""
        with self._lock:
            shown = self._aside.get(path) or self._shown.get(path)
            if shown is not None and shown.opens:
                return now if _is_same(shown.file, now) else shown.file
            if not isinstance(now, File):
                self._shown.pop(path, None)
            elif shown is None or not _is_same(shown.file, now):
                self._shown[path] = Shown(now)
            return now

    def is_overtaken(self, path: str, now: Entry | None) -> bool:
        """Say whether another version than the tree's is open at a path."""
        with self._lock:
            shown = self._shown.get(path)
            return shown is not None and shown.opens > 0 and not _is_same(shown.file, now)

    def open(self, path: str, now: Entry | None) -> tuple[Shown, bool]:
        """Count an open; return what is opened, and whether the kernel's pages are of it.

        Raises ESTALE when the kernel asks for another version than it was told of: it then looks
        the path up again and asks once more, by itself.
        """
        with self._lock:
            shown = self._aside.get(path) or self._shown.get(path)
            if shown is None or not (shown.opens or _is_same(shown.file, now)):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            keeps, shown.is_cached = shown.is_cached, True
            shown.opens += 1
            return shown, keeps

    def close(self, shown: Shown) -> None:
        """Count the end of an open."""
        with self._lock:
            shown.opens -= 1

    def opens(self) -> int:
        """Return how many files are open."""
        with self._lock:
            return sum(one.opens for part in (self._shown, self._aside) for one in part.values())

    def hidden(self, path: str) -> File | None:
        """Return the file that was put aside under a hidden path."""
        with self._lock:
            shown = self._aside.get(path)
            return None if shown is None else shown.file

    def put_aside(self, path: str, hidden: str) -> None:
        """Let a path go; what it was is found at a hidden path from now on."""
        with self._lock:
            shown = self._shown.pop(path, None)
            if shown is not None:
                self._aside[hidden] = shown

    def drop(self, path: str) -> None:
        """Forget what a path, hidden or not, was."""
        with self._lock:
            self._shown.pop(path, None)
            self._aside.pop(path, None)


def _is_same(file: File, now: Entry | None) -> bool:
    return isinstance(now, File) and now.blob == file.blob
