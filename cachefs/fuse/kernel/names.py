"""Answers about names and attributes: what needs the tree and not the bytes.

Every handler takes a request and a way to get a folder's children, and returns the parts of its
reply. Threads that serve give it `peek`, which raises `NotListed` where the origin would have to be
asked; then the folder is listed elsewhere and the handler runs again, with the children in hand.
"""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.files.entries import Entry, File, Folder, find
from weightstream.cachefs.fuse.kernel import wire
from weightstream.cachefs.fuse.kernel.connection import Refusal
from weightstream.cachefs.fuse.kernel.nodes import (
    Node,
    Nodes,
    file_id,
    file_ino,
    folder_id,
)
from weightstream.cachefs.fuse.kernel.wire import Attributes, Parts, Request

if TYPE_CHECKING:
    from weightstream.cachefs.files.content import Content
    from weightstream.cachefs.files.tree import Tree

Children: TypeAlias = tuple[Entry, ...]
ChildrenOf: TypeAlias = Callable[[str], Children]

_FOLDER_MODE = stat.S_IFDIR | 0o555
_LONGEST_NAME = 255  # bytes, as every other file system here has it
_FILE_MODE = stat.S_IFREG | 0o444


class NotListed(Exception):
    """The origin would have to be asked for the children of a folder."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass(frozen=True, slots=True)
class Owner:
    """Who owns what is shown, and since when the folders are there."""

    uid: int
    gid: int
    since_ns: int


class Names:
    """Handlers over a tree. Thread-safe."""

    def __init__(
        self,
        tree: "Tree",
        content: "Content",
        nodes: Nodes,
        allows_passthrough: Callable[[int], bool],
    ) -> None:
        self._tree = tree
        self._content = content
        self._nodes = nodes
        self._allows_passthrough = allows_passthrough
        self.owner = Owner(os.getuid(), os.getgid(), 0)

    # ---- nodes

    def node(self, nodeid: int) -> Node:
        """Return a node that the kernel names; ESTALE makes it look the name up again."""
        node = self._nodes.get(nodeid)
        if node is None:
            raise Refusal(errno.ESTALE)
        return node

    def folder(self, nodeid: int) -> Node:
        """Return a node that must be a folder."""
        node = self.node(nodeid)
        if not isinstance(node.entry, Folder):
            raise Refusal(errno.ENOTDIR)
        return node

    def can_pass(self, blob: Blob, ino: int) -> bool:
        """Say whether a file is opened by passthrough now.

        Not while most of it lies in the server's memory: by passthrough it would be read back from
        the disk to which it has just been written.
        """
        allowed = self._allows_passthrough(file_id(ino, complete=True))
        content = self._content
        return allowed and content.is_complete(blob) and not content.lies_in_memory(blob)

    def identify(self, entry: Entry) -> int:
        """Return the node id that an entry has now."""
        if isinstance(entry, Folder):
            return folder_id(entry.path)
        blob_id = entry.blob.id
        ino = file_ino(entry.path, blob_id)
        complete = self.can_pass(entry.blob, ino)
        if not complete:
            self._nodes.watch(blob_id, entry)
        return file_id(ino, complete)

    def identify_known(self, entry: Entry) -> int:
        """Return the node id of an entry of a long listing, without a look at the disk.

        A file that is complete but was not looked up by name yet gets the id of one that fills; to
        open it costs a second look-up, and listing ten thousand files no look at the store.
        """
        if isinstance(entry, Folder):
            return folder_id(entry.path)
        ino = file_ino(entry.path, entry.blob.id)
        complete = file_id(ino, complete=True)
        return complete if self._nodes.has(complete) else file_id(ino, complete=False)

    def attributes(self, node: Node) -> Attributes:
        """Return what `stat` shows of a node."""
        entry, owner = node.entry, self.owner
        if isinstance(entry, Folder):
            return Attributes(node.ino, _FOLDER_MODE, 0, 2, owner.since_ns, owner.uid, owner.gid)
        return Attributes(
            node.ino, _FILE_MODE, entry.blob.size, 1, entry.modified_ns, owner.uid, owner.gid
        )

    # ---- handlers

    def lookup(self, request: Request, children_of: ChildrenOf) -> Parts:
        """Find a name in a folder."""
        path = self.folder(request.nodeid).entry.path
        name = wire.name_of(request)
        if len(wire.encode(name)) > _LONGEST_NAME:
            raise Refusal(errno.ENAMETOOLONG)
        ttl_s = self._tree.ttl_s(path)  # before the listing: a new one must not get an old time
        entry = find(children_of(path), name)
        if entry is None:
            return [wire.no_entry_out(ttl_s)]
        (node,) = self._nodes.look_up([(self.identify(entry), entry)])
        return [wire.entry_out(node.id, ttl_s, ttl_s, self.attributes(node))]

    def forget(self, request: Request, _: ChildrenOf) -> None:
        """Count look-ups down; there is no reply."""
        for nodeid, count in wire.forgets_of(request):
            self._nodes.forget(nodeid, count)

    def getattr(self, request: Request, _: ChildrenOf) -> Parts:
        """Say what a node is."""
        node = self.node(request.nodeid)
        return [wire.attr_out(self._attributes_s(node), self.attributes(node))]

    def statx(self, request: Request, _: ChildrenOf) -> Parts:
        """Say what a node is, with the time of its birth."""
        node = self.node(request.nodeid)
        return [wire.statx_out(self._attributes_s(node), self.attributes(node))]

    def _attributes_s(self, node: Node) -> float:
        """Return for how long attributes hold: those of a version never change."""
        return max(1.0, self._tree.ttl_s(node.entry.folder))

    def readlink(self, request: Request, _: ChildrenOf) -> Parts:
        """Refuse: nothing is a symbolic link."""
        self.node(request.nodeid)
        raise Refusal(errno.EINVAL)

    def access(self, request: Request, _: ChildrenOf) -> Parts:
        """Say who may do what; the kernel asks only where it does not check the mode itself."""
        node, mask = self.node(request.nodeid), wire.first_u32_of(request)
        if mask & os.W_OK:
            raise Refusal(errno.EROFS)
        if mask & os.X_OK and isinstance(node.entry, File):
            raise Refusal(errno.EACCES)
        return []
