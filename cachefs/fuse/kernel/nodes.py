"""Node ids: what the kernel calls the files and folders that it has heard of.

An id is made from a path and a version, and its lowest bit says how the file is opened: 0 while it
fills, through the kernel's page cache; 1 when it is complete, by passthrough. The kernel answers
EIO to whoever opens one node in both ways, so a file changes its node when it completes. A new
server makes the same ids as an old one; the journal tells it which ones were given out, superseded
versions among them, whose open handles must go on or say ESTALE.

Ids are 62 bits of BLAKE3 and the state: for two of a million names to meet is a chance of one in
ten million, and then the second one is refused, for wrong bytes are worse than none.
"""

import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from blake3 import blake3

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.files.entries import Entry, File, Folder
from weightstream.cachefs.fuse.kernel.journal import Journal, Record
from weightstream.cachefs.fuse.kernel.wire import ROOT_ID
from weightstream.errors import WeightstreamError

log = logging.getLogger(__name__)

_BITS = (1 << 62) - 1
ROOT_INO = 1


class NodeError(WeightstreamError):
    """Two names have the same node id."""


def file_ino(path: str, blob_id: str) -> int:
    """Return the inode number of a version of a file."""
    return _number(f"file\0{path}\0{blob_id}")


def folder_ino(path: str) -> int:
    """Return the inode number of a folder."""
    return _number(f"folder\0{path}") if path else ROOT_INO


def _number(text: str) -> int:
    digest = blake3(text.encode(errors="surrogatepass")).digest(length=8)
    return max(int.from_bytes(digest, "little") & _BITS, 2)  # 1 is the root's


def file_id(ino: int, complete: bool) -> int:
    """Return the node id of a file."""
    return ino << 1 | complete


def folder_id(path: str) -> int:
    """Return the node id of a folder."""
    return folder_ino(path) << 1 if path else ROOT_ID


@dataclass(slots=True, eq=False)
class Node:
    """What one id stands for. `Nodes`, whose lock guards it, counts the lookups."""

    id: int
    entry: Entry
    lookups: int = 0
    is_inherited: bool = False
    """Whether an earlier server gave it out; how often is not known, so it is never dropped."""

    listed: tuple[Entry, ...] | None = field(default=None, repr=False)
    """The children that the kernel has in its cache, as far as is known."""

    @property
    def ino(self) -> int:
        """Return what `stat` shows: it stays the same when the file completes."""
        return ROOT_INO if self.id == ROOT_ID else self.id >> 1

    @property
    def is_complete(self) -> bool:
        """Say whether it is opened by passthrough."""
        return isinstance(self.entry, File) and bool(self.id & 1)


class Nodes:
    """The nodes that the kernel may ask about. Thread-safe."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._by_id = {ROOT_ID: Node(ROOT_ID, Folder(""), is_inherited=True)}
        self._written = {ROOT_ID}
        self._filling: dict[str, File] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def begin(self) -> None:
        """Start with nothing but the root."""
        with self._lock:
            self._journal.begin()

    def load(self) -> None:
        """Know what an earlier server gave out."""
        with self._lock:
            for record in self._journal.load():
                node = _node_of(record)
                if node is not None:
                    self._by_id[node.id] = node
                    self._written.add(node.id)
                    if isinstance(node.entry, File) and not node.is_complete:
                        self._filling[node.entry.blob.id] = node.entry

    def get(self, nodeid: int) -> Node | None:
        """Return what an id stands for."""
        return self._by_id.get(nodeid)

    def has(self, nodeid: int) -> bool:
        """Say whether the kernel may know an id."""
        return nodeid in self._by_id

    def look_up(self, wanted: Iterable[tuple[int, Entry]]) -> list[Node]:
        """Return the nodes of (id, entry), each counted as looked up once more.

        Raises `NodeError` for an id that stands for something else already.
        """
        found: list[Node] = []
        new: list[Record] = []
        with self._lock:
            for nodeid, entry in wanted:
                node = self._by_id.get(nodeid)
                if node is None:
                    node = self._by_id[nodeid] = Node(nodeid, entry)
                    new.extend(self._unwritten(node))
                elif node.entry is not entry:
                    _check_same(node, entry)
                    node.entry = entry  # the same version; its time may be another
                node.lookups += 1
                found.append(node)
            self._journal.append(new)
        return found

    def _unwritten(self, node: Node) -> Iterator[Record]:
        if node.id not in self._written:
            self._written.add(node.id)
            yield _record_of(node)

    def forget(self, nodeid: int, count: int) -> None:
        """Hear that the kernel does not know a node any more, `count` lookups less."""
        with self._lock:
            node = self._by_id.get(nodeid)
            if node is None:
                return
            node.lookups -= count
            if node.lookups <= 0 and not node.is_inherited:
                del self._by_id[nodeid]
                if isinstance(node.entry, File) and not node.is_complete:
                    self._filling.pop(node.entry.blob.id, None)

    def watch(self, blob_id: str, file: File) -> None:
        """Remember that a file that still fills was given out."""
        self._filling[blob_id] = file

    def completed(self, blob_id: str) -> File | None:
        """Return the file that was given out while it filled, once."""
        return self._filling.pop(blob_id, None)


def _check_same(node: Node, entry: Entry) -> None:
    known = node.entry
    same = known.path == entry.path and type(known) is type(entry)
    if same and isinstance(known, File) and isinstance(entry, File):
        same = known.blob == entry.blob
    if not same:
        raise NodeError(f"{entry.path!r} and {known.path!r} have the same node id")


def _record_of(node: Node) -> Record:
    entry = node.entry
    if isinstance(entry, Folder):
        return (node.id, entry.path)
    blob = entry.blob
    return (node.id, entry.path, blob.uri, blob.size, blob.version, entry.modified_ns)


def _node_of(record: Record) -> Node | None:
    """Read what `_record_of` wrote; None for what another version of weightstream wrote."""
    match record:
        case [int(nodeid), str(path)]:
            return Node(nodeid, Folder(path), is_inherited=True)
        case [int(nodeid), str(path), str(uri), int(size), str(version), int(modified_ns)]:
            file = File(path, Blob(uri, size, version), modified_ns)
            return Node(nodeid, file, is_inherited=True)
    log.debug("not a node: %r", record)
    return None
