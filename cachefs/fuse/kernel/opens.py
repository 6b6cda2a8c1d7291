"""Open files: how each is opened, what is counted, and how it is closed.

A handle is the number of the request that opened it, so that an OPEN which two servers worked on
(the first was killed before its answer) is one handle.

    node of a file that fills    through the kernel's page cache (KEEP_CACHE), or DIRECT_IO
    node of a complete file      by passthrough, never otherwise

ESTALE has the kernel look the path up again, once, and open what it finds then. So an open that
comes to the wrong node (the file has completed, was evicted, or was replaced by another version)
is sent back. The second try of a thread is served as it is: it comes by no path
(`/proc/self/fd/3`), or things change faster than it can open them.

NOFLUSH: to close a file must not wait for a server, which may be dead just then.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from weightstream import metrics
from weightstream.cachefs.files.entries import File, find
from weightstream.cachefs.fuse.kernel import wire
from weightstream.cachefs.fuse.kernel.connection import Refusal
from weightstream.cachefs.fuse.kernel.names import Names
from weightstream.cachefs.fuse.kernel.nodes import Node, Nodes
from weightstream.cachefs.fuse.kernel.passthrough import Passthrough
from weightstream.cachefs.fuse.kernel.protocol import Open
from weightstream.cachefs.fuse.kernel.wire import Parts, Request
from weightstream.errors import WeightstreamError

if TYPE_CHECKING:
    from weightstream.cachefs.files.content import Content
    from weightstream.cachefs.files.tree import Tree

log = logging.getLogger(__name__)

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_TRUNC
_MOST_SENT_BACK = 4096
_TRIES_AGAIN_S = 5.0


class Opens:
    """Files that are open. Thread-safe."""

    def __init__(
        self,
        tree: "Tree",
        content: "Content",
        nodes: Nodes,
        names: Names,
        passthrough: Passthrough,
    ) -> None:
        self._nodes = nodes
        self._tree = tree
        self._content = content
        self._names = names
        self._passthrough = passthrough
        self._lock = threading.Lock()
        self._files: dict[int, File] = {}
        self._sent_back: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._files)

    def check(self, request: Request) -> None:
        """Refuse what must not even reach a file: a backing file could be opened for writing."""
        node = self._names.node(request.nodeid)
        if not isinstance(node.entry, File):
            raise Refusal(errno.EISDIR)
        if wire.open_flags_of(request) & _WRITING:
            raise Refusal(errno.EROFS)

    def open(self, request: Request) -> Parts:
        """Open a file that was checked; may wait for a fill that is about to end.

        What it counted before it raised is to be undone.
        """
        node = self._names.node(request.nodeid)
        if node.is_complete:
            return self._open_passing(request, node)
        return self._open_filling(request, node)

    def _open_filling(self, request: Request, node: Node) -> Parts:
        file = _file_of(node)
        is_second = self._was_sent_back(request)
        if not is_second and self._leads_elsewhere(node):
            self._send_back(request)
        handle = self._count(_handle(request), file)
        if not is_second and self._leads_elsewhere(node):  # for a moment, maybe
            self._send_back(request)
        direct = bool(wire.open_flags_of(request) & os.O_DIRECT)
        flags = Open.NOFLUSH
        if direct:
            flags |= Open.DIRECT_IO
        elif file.blob.version:  # else the same name may have other bytes by now
            flags |= Open.KEEP_CACHE
        metrics.FUSE_OPENS.labels("direct" if direct else "cached").inc()
        return [wire.open_out(handle, flags)]

    def _open_passing(self, request: Request, node: Node) -> Parts:
        file = _file_of(node)
        if not self._was_sent_back(request) and self._is_replaced(node):
            self._send_back(request)
        # What is open already goes on, whatever became of the store's copy.
        if not self._passthrough.is_open(node.id) and not self._names.can_pass(file.blob, node.ino):
            raise Refusal(errno.ESTALE)
        handle = self._count(_handle(request), file)
        backing_id = self._passthrough.open(handle, node.id, lambda: self._data_of(file))
        if backing_id is None:  # evicted a moment ago
            raise Refusal(errno.ESTALE)
        metrics.FUSE_OPENS.labels("passthrough").inc()
        return [wire.open_out(handle, Open.PASSTHROUGH | Open.NOFLUSH, backing_id)]

    def _data_of(self, file: File) -> int | None:
        try:
            return self._content.backing(file.blob)
        except WeightstreamError as error:
            log.warning("%s is not passed through: %s", file.path, error)
            return None

    def release(self, request: Request) -> Parts:
        """Close a file."""
        self.close(wire.handle_of(request))
        return []

    def close(self, handle: int) -> None:
        """Close a handle, also one that the kernel never heard of."""
        with self._lock:
            file = self._files.pop(handle, None)
        self._passthrough.release(handle)
        if file is not None:
            self._content.released(file)

    def adopt(self, handles: Mapping[int, int]) -> None:
        """Count what an earlier server opened by passthrough, so that it is not evicted."""
        for handle, nodeid in handles.items():
            node = self._nodes.get(nodeid)
            if node is None:  # the journal could not be written then
                continue
            file = _file_of(node)
            if self._names.can_pass(file.blob, node.ino):
                self._count(handle, file)

    def undo(self, request: Request) -> None:
        """Close what an open counted that failed, or whose answer nobody wanted."""
        self.close(_handle(request))

    def _count(self, handle: int, file: File) -> int:
        if handle in self._files:  # an earlier server had counted it, and did not say so
            return handle
        try:
            self._content.opened(file)
        except WeightstreamError as error:
            log.debug("opened without the store: %s", error)
            return handle
        with self._lock:
            self._files[handle] = file
        return handle

    def _leads_elsewhere(self, node: Node) -> bool:
        """Say whether the path of a file that fills leads to another node by now."""
        return self._names.can_pass(_file_of(node).blob, node.ino) or self._is_replaced(node)

    def _is_replaced(self, node: Node) -> bool:
        """Say whether the folder is known to have another version of the file by now, or none."""
        file = _file_of(node)
        children = self._tree.peek(file.folder)
        if children is None:
            return False
        now = find(children, file.name)
        return not isinstance(now, File) or now.blob != file.blob

    def _was_sent_back(self, request: Request) -> bool:
        """Say whether this thread tries again; whatever it comes with now is good enough."""
        with self._lock:
            until_s = self._sent_back.pop(request.pid, 0.0)
        return time.monotonic() < until_s

    def _send_back(self, request: Request) -> NoReturn:
        with self._lock:
            if len(self._sent_back) >= _MOST_SENT_BACK:
                self._sent_back.clear()
            self._sent_back[request.pid] = time.monotonic() + _TRIES_AGAIN_S
        raise Refusal(errno.ESTALE)


def _handle(request: Request) -> int:
    return request.unique & ~wire.RESENT


def _file_of(node: Node) -> File:
    assert isinstance(node.entry, File)
    return node.entry
