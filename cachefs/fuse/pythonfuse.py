"""The fuse-python driver: libfuse 2 asks, a tree and its contents answer.

For who may not mount by system call (fusermount does) and for kernels that lack what the kernel
driver needs. libfuse names everything by path and has a thread for each request that waits, so the
handlers are straightforward and may block. What it cannot do, and what that costs:

* requests of more than 128 KiB, so a read costs eight times as many as with the kernel driver;
* passthrough: complete files are read from the store through this process;
* time-outs of single entries, and invalidation: the kernel keeps names and attributes for a second;
* a mount flag `ro`: an object that is replaced while it is open has its name unlinked, by us (see
  `versions.py`). Everybody else's attempts to change something are refused by the handlers.
"""

import errno
import functools
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from weightstream import metrics
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.files.entries import Change, Entry, File, Folder, join
from weightstream.cachefs.fuse.kernel.nodes import file_ino, folder_ino
from weightstream.cachefs.fuse.pythonaside import Aside
from weightstream.cachefs.fuse.pythonreads import interrupted_question, read_unless
from weightstream.cachefs.fuse.versions import HIDDEN, Shown, Versions
from weightstream.errors import WeightstreamError

if TYPE_CHECKING:
    from pathlib import Path

    from weightstream.cachefs.files.content import Content
    from weightstream.cachefs.files.tree import Tree

# Not by an import statement: type checkers take the folder that we are in for it.
fuse: Any = import_module("fuse")
fuse.fuse_python_api = (0, 2)

log = logging.getLogger(__name__)

_PREFIX = "user.weightstream."
_OF_FILES = tuple(_PREFIX + name for name in ("uri", "etag", "cached", "state"))
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _answering(handler: Callable[_P, _R]) -> Callable[_P, _R | int]:
    """Have a handler's errors answered as errno; what is no error of ours is a bug, and EIO."""

    @functools.wraps(handler)
    def answer(*args: _P.args, **kwargs: _P.kwargs) -> _R | int:
        try:
            return handler(*args, **kwargs)
        except WeightstreamError as error:
            if error.errno == errno.EIO:
                log.warning("%s: %s", handler.__name__, error)
            return -error.errno
        except OSError as error:
            return -(error.errno or errno.EIO)
        except Exception:
            log.exception("unexpected, in %s", handler.__name__)
            return -errno.EIO

    return answer


def _refused(*_: object) -> int:
    return -errno.EROFS


class Handle:
    """An open file."""

    direct_io = False

    def __init__(self, shown: Shown, keep_cache: bool) -> None:
        self.shown = shown
        self.file = shown.file
        self.keep_cache = keep_cache  # fuse-python looks for this name
        self._lock = threading.Lock()
        self._data = -1
        self._is_closed = False

    def data(self, content: "Content") -> int:
        """Return a descriptor of the complete file in the store; -1 while it is not complete."""
        if self._data < 0 and content.is_complete(self.file.blob):
            with self._lock:
                if self._data < 0 and not self._is_closed:
                    found = content.backing(self.file.blob)
                    self._data = -1 if found is None else found
        return self._data

    def close(self) -> None:
        """Close it; no read is under way any more."""
        with self._lock:
            self._is_closed = True
            if self._data >= 0:
                os.close(self._data)
            self._data = -1


class PythonFuse(fuse.Fuse):  # type: ignore[misc]
    """The handlers of one mount. Thread-safe: each request has a thread of libfuse's."""

    refused: ClassVar[Sequence[str]] = (
        "mknod", "mkdir", "rmdir", "symlink", "link", "chmod", "chown", "truncate", "ftruncate",
        "utime", "utimens", "write", "create", "setxattr", "removexattr",
    )  # fmt: skip

    def __init__(
        self,
        directory: str,
        tree: "Tree",
        content: "Content",
        store: "Path | None",
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__()
        self.multithreaded = True
        for name in self.refused:
            setattr(self, name, _refused)
        self._tree = tree
        self._content = content
        self._store = store
        self._on_ready = on_ready
        self._owner = os.geteuid(), os.getegid()
        self._since_s = int(time.time())
        self._aside = Aside(directory)
        self.versions = Versions()
        self.is_interrupted = interrupted_question()

    def changed(self, changes: Sequence[Change]) -> None:
        """Put aside what is open and was replaced; the tree says so."""
        for change in changes:
            path = join(change.folder, change.name)
            if self.versions.is_overtaken(path, self._tree.entry(path)):
                self._aside.put(path)

    def close(self) -> None:
        """Let the thread that puts aside end."""
        self._aside.close()

    # Names and attributes

    def fsinit(self) -> None:
        """Hear that the kernel asks: the mount works."""
        self._on_ready()

    @_answering
    def getattr(self, path: str) -> Any:
        """Say what is at a path."""
        return self._stat(self._entry(path[1:]))

    def fgetattr(self, path: str, handle: Handle) -> Any:
        """Say what an open file is."""
        return self._stat(handle.file)

    @_answering
    def readdir(self, path: str, offset: int, *_: object) -> Iterator[Any]:
        """List a folder."""
        children = self._tree.children(path[1:])
        return iter([fuse.Direntry("."), fuse.Direntry(".."), *map(_listed, children)])

    @_answering
    def access(self, path: str, mask: int) -> int:
        """Say who may do what: everybody may read."""
        entry = self._entry(path[1:])
        if mask & os.W_OK:
            return -errno.EROFS
        return -errno.EACCES if mask & os.X_OK and isinstance(entry, File) else 0

    @_answering
    def statfs(self) -> Any:
        """Return the numbers of the store's disk."""
        return os.statvfs(self._store) if self._store is not None else fuse.StatVfs(f_bsize=4096)

    @_answering
    def getxattr(self, path: str, name: str, size: int) -> int | str:
        """Return one of our attributes; libfuse cares for the size."""
        if not name.startswith("user."):  # `ls -l` then asks no other file of the device
            return -errno.EOPNOTSUPP
        entry = self._entry(path[1:])
        if isinstance(entry, File) and name in _OF_FILES:
            return self._attribute(entry.blob, name.removeprefix(_PREFIX))
        if isinstance(entry, Folder) and name == _OF_FILES[0]:
            root = self._tree.uri
            return join(root.rstrip("/"), entry.path) if entry.path else root
        raise OSError(errno.ENODATA, name)

    @_answering
    def listxattr(self, path: str, size: int) -> int | list[str]:
        """Return the names of our attributes, or what room they need."""
        entry = self._entry(path[1:])
        names = list(_OF_FILES if isinstance(entry, File) else _OF_FILES[:1])
        needed = sum(len(name) + 1 for name in names)
        if not size:
            return needed
        return names if size >= needed else -errno.ERANGE

    # Files

    @_answering
    def open(self, path: str, flags: int) -> Any:
        """Open a file, in the version that the kernel was told of."""
        if flags & _WRITES:
            return -errno.EROFS
        hidden = self.versions.hidden(path[1:])
        now = self._tree.entry(path[1:]) if hidden is None else hidden
        shown, keeps = self.versions.open(path[1:], now)
        if self.versions.is_overtaken(path[1:], now):
            self._aside.put(path[1:])
        self._content.opened(shown.file)
        return Handle(shown, keeps)

    @_answering
    def read(self, path: str, size: int, offset: int, handle: Handle) -> bytes:
        """Return bytes; waits for them."""
        metrics.FUSE_REQUESTS.labels("read").inc()
        data = handle.data(self._content)
        if data >= 0:
            found = os.pread(data, size, offset)
        else:
            found = read_unless(
                self.is_interrupted, self._content, handle.file, Extent(offset, offset + size)
            )
        metrics.FUSE_READ_BYTES.labels("cached").inc(len(found))
        return found

    @_answering
    def release(self, path: str, flags: int, handle: Handle) -> int:
        """Close a file."""
        handle.close()
        self.versions.close(handle.shown)
        self._content.released(handle.file)
        return 0

    def flush(self, path: str, handle: Handle) -> int:
        """Do nothing: nothing was written."""
        return 0

    # Putting aside: what only our own thread may do, and libfuse for it

    @_answering
    def rename(self, path: str, to: str) -> int:
        """Let libfuse hide a file that is open and that we unlink."""
        if not (self._aside.is_asking(self.GetContext()) and _is_hidden(to)):
            return -errno.EROFS
        self.versions.put_aside(path[1:], to[1:])
        return 0

    @_answering
    def unlink(self, path: str) -> int:
        """Let a name go: ours, or one that libfuse has hidden."""
        hidden = self.versions.hidden(path[1:]) is not None
        if not hidden and not self._aside.is_asking(self.GetContext()):
            return -errno.EROFS
        self.versions.drop(path[1:])
        return 0

    def _entry(self, path: str) -> Entry:
        """Return what a path is to the kernel now. Raises ENOENT."""
        aside = self.versions.hidden(path)
        if aside is not None:
            return aside
        now = self._tree.entry(path)
        if self.versions.is_overtaken(path, now):
            self._aside.put(path)
        entry = self.versions.show(path, now)
        if entry is None:
            raise OSError(errno.ENOENT, path)
        return entry

    def _attribute(self, blob: Blob, name: str) -> str:
        if name == "uri":
            return blob.uri
        if name == "etag":
            return blob.version
        state = self._content.state(blob)
        return str(state.present_bytes) if name == "cached" else state.state

    def _stat(self, entry: Entry) -> Any:
        uid, gid = self._owner
        if isinstance(entry, Folder):
            mode, size, links, modified_s = stat.S_IFDIR | 0o555, 0, 2, self._since_s
        else:
            mode, size, links = stat.S_IFREG | 0o444, entry.blob.size, 1
            modified_s = entry.modified_ns // 1_000_000_000  # it takes whole seconds only
        return fuse.Stat(
            st_mode=mode, st_ino=_ino(entry), st_nlink=links, st_uid=uid, st_gid=gid, st_size=size,
            st_atime=modified_s, st_mtime=modified_s, st_ctime=modified_s,
        )  # fmt: skip


def _listed(entry: Entry) -> Any:
    kind = stat.S_IFDIR if isinstance(entry, Folder) else stat.S_IFREG
    return fuse.Direntry(entry.name, type=kind, ino=_ino(entry))


def _is_hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(HIDDEN)


def _ino(entry: Entry) -> int:
    if isinstance(entry, Folder):
        return folder_ino(entry.path)
    return file_ino(entry.path, entry.blob.id)
