"""Where things lie in the store's directory, and the marker that says it is one.

    STORE/format.json               marker: the number of the format
    STORE/lock                      empty; byte int(id) is locked to make or remove blob id
    STORE/blobs/<id[:2]>/<id>.data  the file's bytes, sparse, full size from the start
    STORE/blobs/<id[:2]>/<id>.table what is there: header and 64 bytes per chunk
    STORE/listings/<hash>.json      what the origin listed last

A directory that has files but no marker belongs to somebody else and is left alone: a typo in
`WEIGHTSTREAM_STORE` must never make eviction run in a home directory.
"""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from weightstream.cachefs.store.files import (
    DIRECTORY_MODE,
    OpenFile,
    fsync_directory,
    store_error,
    write_fully,
)
from weightstream.errors import ForeignStoreError, StoreError, StoreReadOnlyError

FORMAT = 1
_KEY = "weightstream_store"
_MARKER = "format.json"
# What an otherwise empty directory may hold: the root of a fresh ext4, our own half-made markers.
_HARMLESS = ("lost+found", f"{_MARKER}.")


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one store."""

    root: Path

    @property
    def marker(self) -> Path:
        """Return the path of the marker."""
        return self.root / _MARKER

    @property
    def lock(self) -> Path:
        """Return the path of the file whose bytes are locked to create and remove blobs."""
        return self.root / "lock"

    @property
    def blobs(self) -> Path:
        """Return the directory of blobs."""
        return self.root / "blobs"

    @property
    def listings(self) -> Path:
        """Return the directory of listings."""
        return self.root / "listings"

    def data(self, blob_id: str) -> Path:
        """Return the path of a blob's bytes."""
        return self.blobs / blob_id[:2] / f"{blob_id}.data"

    def table(self, blob_id: str) -> Path:
        """Return the path of a blob's chunk table."""
        return self.blobs / blob_id[:2] / f"{blob_id}.table"

    def listing(self, uri: str) -> Path:
        """Return the path of the stored listing of `uri`."""
        return self.listings / f"{blake3(uri.encode()).hexdigest(length=16)}.json"

    def files(self) -> Iterator[Path]:
        """Yield every file under blobs/, whatever it is."""
        for folder in _children(self.blobs):
            yield from _children(folder)

    def blob_ids(self) -> Iterator[str]:
        """Yield the ids of all blobs that have a table."""
        for path in self.files():
            if path.suffix == ".table":
                yield path.stem


def lock_byte(blob_id: str) -> int:
    """Return the byte of STORE/lock that guards the names of a blob; it fits an off_t."""
    return int(blob_id[:15], 16)


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def open_layout(root: Path) -> tuple[Layout, bool]:
    """Return the layout and whether it can be written; make the store when nothing is there."""
    layout = Layout(root)
    try:
        if not _is_marked(layout):
            _claim(layout)
    except OSError as error:
        raise _refusal(root, error) from error
    return layout, os.access(root, os.W_OK | os.X_OK, effective_ids=True)


def _refusal(root: Path, error: OSError) -> StoreError:
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return ForeignStoreError(f"the store {root} is not a directory")
    return store_error(f"use the store {root}", error)


def _claim(layout: Layout) -> None:
    """Make the marker, once, whoever else tries at the same moment."""
    layout.root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    foreign = [name for name in os.listdir(layout.root) if not name.startswith(_HARMLESS)]
    if foreign and not _is_marked(layout):
        raise ForeignStoreError(
            f"{layout.root} is not empty and has no {_MARKER}: not a weightstream store"
        )
    if not os.access(layout.root, os.W_OK | os.X_OK, effective_ids=True):
        raise StoreReadOnlyError(f"cannot make a store in {layout.root}: no permission to write")
    if not foreign:
        _write_marker(layout)


def _write_marker(layout: Layout) -> None:
    temporary = layout.root / f"{_MARKER}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    try:
        file = OpenFile(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        write_fully(file.fileno(), memoryview(json.dumps({_KEY: FORMAT}).encode()), 0)
        os.fsync(file.fileno())
        # link, not rename: of many that open the store at once one wins, nobody overwrites it
        os.link(temporary, layout.marker)
        fsync_directory(layout.root)
    except FileExistsError:
        _is_marked(layout)
    finally:
        temporary.unlink(missing_ok=True)


def _is_marked(layout: Layout) -> bool:
    """Say whether the marker is there; raise when it is not ours or of another format."""
    try:
        content = json.loads(layout.marker.read_bytes())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise ForeignStoreError(f"{layout.marker} is not a store's marker: {error}") from error
    found = content.get(_KEY) if isinstance(content, dict) else None
    if found != FORMAT:
        raise ForeignStoreError(
            f"{layout.root} is a store of format {found}; this version reads format {FORMAT}"
        )
    return True
