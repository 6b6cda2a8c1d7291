"""Answers about folders: what is in them.

The kernel keeps what it read of a folder (CACHE_DIR). It asks at every opendir, and is told to go
on with what it has (KEEP_CACHE) if that is what the tree says now; so `ls -lR` of an unchanged
tree costs one question a folder, and none of them reaches the origin within the TTL.
"""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weightstream.cachefs.files.entries import Entry, Folder
from weightstream.cachefs.fuse.kernel import wire
from weightstream.cachefs.fuse.kernel.names import Children, ChildrenOf, Names
from weightstream.cachefs.fuse.kernel.nodes import Nodes, file_ino, folder_ino
from weightstream.cachefs.fuse.kernel.protocol import Open
from weightstream.cachefs.fuse.kernel.wire import Parts, Request

if TYPE_CHECKING:
    from weightstream.cachefs.files.tree import Tree

_DOTS = 2  # "." and ".." come first


class Folders:
    """Handlers for open folders. Thread-safe."""

    def __init__(self, tree: "Tree", nodes: Nodes, names: Names) -> None:
        self._tree = tree
        self._nodes = nodes
        self._names = names
        self._lock = threading.Lock()
        self._open: dict[int, Children] = {}

    def __len__(self) -> int:
        return len(self._open)

    def opendir(self, request: Request, children_of: ChildrenOf) -> Parts:
        """Open a folder as it is now."""
        node = self._names.folder(request.nodeid)
        children = children_of(node.entry.path)
        handle = request.unique & ~wire.RESENT
        flags = Open.CACHE_DIR
        with self._lock:
            self._open[handle] = children
            if node.listed == children:  # mostly the very same tuple
                flags |= Open.KEEP_CACHE
            node.listed = children
        return [wire.open_out(handle, flags)]

    def releasedir(self, request: Request, _: ChildrenOf) -> Parts:
        """Close a folder."""
        with self._lock:
            self._open.pop(wire.handle_of(request), None)
        return []

    def readdir(self, request: Request, children_of: ChildrenOf) -> Parts:
        """List names, inode numbers and kinds."""
        children, start, room = self._opened(request, children_of)
        folder = self._names.folder(request.nodeid).entry
        fitting = _fitting(folder, children, start, room, plus=False)
        return [b"".join(_dirent(entry, at + 1, name) for at, name, entry in fitting)]

    def readdirplus(self, request: Request, children_of: ChildrenOf) -> Parts:
        """List names and look all of them up."""
        children, start, room = self._opened(request, children_of)
        folder = self._names.folder(request.nodeid).entry
        ttl_s = self._tree.ttl_s(folder.path)
        if self._tree.peek(folder.path) is not children:
            ttl_s = 0.0  # opened long ago: whoever uses these names must ask again
        fitting = list(_fitting(folder, children, start, room, plus=True))
        identify = self._names.identify_known
        found = self._nodes.look_up(
            [(identify(entry), entry) for at, _, entry in fitting if at >= _DOTS]
        )
        nodes = iter(found)
        parts: list[bytes] = []
        for at, name, entry in fitting:
            if at < _DOTS:  # the kernel neither counts nor uses these
                parts.append(wire.NO_ENTRY)
            else:
                node = next(nodes)
                attributes = self._names.attributes(node)
                parts.append(wire.entry_out(node.id, ttl_s, ttl_s, attributes))
            parts.append(_dirent(entry, at + 1, name))
        return [b"".join(parts)]

    def _opened(self, request: Request, children_of: ChildrenOf) -> tuple[Children, int, int]:
        """Return what a handle shows, where to go on and how many bytes fit."""
        node = self._names.folder(request.nodeid)
        handle, start, room = wire.read_of(request)
        children = self._open.get(handle)
        if children is None:  # opened through an earlier server
            children = children_of(node.entry.path)
        if node.listed is not children:
            node.listed = None  # the kernel may mix this into its cache: have it read afresh
        return children, start, room


def _fitting(
    folder: Entry, children: Children, start: int, room: int, *, plus: bool
) -> Iterator[tuple[int, bytes, Entry]]:
    """Yield (offset, name, entry) from `start` on, as many as there is room for."""
    for at in range(start, len(children) + _DOTS):
        if at < _DOTS:
            name, entry = (b".", b"..")[at], (folder, Folder(folder.folder))[at]
        else:
            entry = children[at - _DOTS]
            name = wire.encode(entry.name)
        room -= wire.dirent_bytes(name, plus)
        if room < 0:
            return
        yield at, name, entry


def _dirent(entry: Entry, following: int, name: bytes) -> bytes:
    if isinstance(entry, Folder):
        return wire.dirent(folder_ino(entry.path), following, wire.DT_DIR, name)
    return wire.dirent(file_ino(entry.path, entry.blob.id), following, wire.DT_REG, name)
