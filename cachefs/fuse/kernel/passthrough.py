"""Complete files, opened by the kernel straight onto their data files.

One backing id per node for as long as anybody has it open: the kernel refuses (EIO) a second
backing file for an inode that is open. So the ids outlive a server in the journal, with the
handles that use them; the kernel keeps the ids themselves, for they belong to the connection.

Lock: one, held while a data file is opened and registered, so that two opens make one id. That
waits for the local disk at most.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from weightstream.cachefs.fuse.kernel import device
from weightstream.cachefs.fuse.kernel.journal import Journal, Record

log = logging.getLogger(__name__)

_SPARE_RECORDS = 10_000
"""So many records of handles that are closed may lie in the journal: about a megabyte."""


@dataclass(slots=True)
class _Backing:
    id: int
    handles: set[int] = field(default_factory=set)


class Passthrough:
    """The backing ids of one connection. Thread-safe."""

    def __init__(self, fuse_fd: int, journal: Journal) -> None:
        self._fd = fuse_fd
        self._journal = journal
        self._lock = threading.Lock()
        self._by_node: dict[int, _Backing] = {}
        self._node_of: dict[int, int] = {}
        self._refused: set[int] = set()
        self.enabled = False

    def __len__(self) -> int:
        return len(self._by_node)

    def begin(self) -> None:
        """Start with nothing open."""
        with self._lock:
            self._journal.begin()

    def load(self) -> dict[int, int]:
        """Know what is open through an earlier server: return the node ids by handle."""
        unused: _Backing | None = None
        with self._lock:
            for record in self._journal.load():
                match record:
                    case [int(handle), int(nodeid), int(backing_id)]:
                        self._note(handle, nodeid, backing_id)
                        unused = None
                    case [int(handle)]:
                        unused = self._drop(handle)
            if unused is not None:  # the server may have died between this record and the ioctl
                self._close(unused)
            return dict(self._node_of)

    def allows(self, nodeid: int) -> bool:
        """Say whether a file may be opened this way when it is complete."""
        return self.enabled and nodeid not in self._refused

    def is_open(self, nodeid: int) -> bool:
        """Say whether anybody has a file open."""
        return nodeid in self._by_node

    def open(self, handle: int, nodeid: int, open_data: Callable[[], int | None]) -> int | None:
        """Return the backing id for a new handle; None when there is no data file, or no way."""
        with self._lock:
            backing = self._by_node.get(nodeid)
            backing_id = backing.id if backing is not None else self._register(nodeid, open_data)
            if backing_id is None:
                return None
            self._note(handle, nodeid, backing_id)
            self._journal.append([(handle, nodeid, backing_id)])
            return backing_id

    def release(self, handle: int) -> None:
        """Hear that a handle was closed; with a file's last one its backing id goes."""
        with self._lock:
            if handle not in self._node_of:
                return
            self._journal.append([(handle,)])
            if unused := self._drop(handle):
                self._close(unused)
            if self._journal.length > 2 * len(self._node_of) + _SPARE_RECORDS:
                self._journal.replace(self._records())

    def _register(self, nodeid: int, open_data: Callable[[], int | None]) -> int | None:
        fd = open_data()
        if fd is None:
            return None
        try:
            return device.backing_open(self._fd, fd)
        except OSError as error:
            self._refuse(nodeid, error)
            return None
        finally:
            os.close(fd)

    def _refuse(self, nodeid: int, error: OSError) -> None:
        """Never try again what will not change; else this file is read through the server."""
        if error.errno in (errno.EPERM, errno.ENOTTY, errno.EOPNOTSUPP):
            self.enabled = False
        if error.errno != errno.ENODEV:  # unmounted
            self._refused.add(nodeid)
            log.warning("no passthrough for node %d: %s", nodeid, error.strerror)

    def _note(self, handle: int, nodeid: int, backing_id: int) -> None:
        self._by_node.setdefault(nodeid, _Backing(backing_id)).handles.add(handle)
        self._node_of[handle] = nodeid

    def _drop(self, handle: int) -> _Backing | None:
        """Forget a handle; return the backing that nobody uses any more."""
        nodeid = self._node_of.pop(handle, None)
        if nodeid is None:
            return None
        backing = self._by_node[nodeid]
        backing.handles.discard(handle)
        return None if backing.handles else self._by_node.pop(nodeid)

    def _close(self, backing: _Backing) -> None:
        try:
            device.backing_close(self._fd, backing.id)
        except OSError as error:  # ENOENT: an earlier server did it; ENODEV: unmounted
            log.debug("closing backing id %d: %s", backing.id, error)

    def _records(self) -> list[Record]:
        return [
            (handle, nodeid, self._by_node[nodeid].id) for handle, nodeid in self._node_of.items()
        ]
