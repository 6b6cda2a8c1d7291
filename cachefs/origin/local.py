"""Files of this machine: `file://` URLs and plain paths."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.origin.base import (
    Checksum,
    FolderListing,
    Listed,
    Listing,
    folder_listing,
)
from weightstream.cachefs.origin.failures import translated
from weightstream.cachefs.origin.responses import Asked
from weightstream.errors import NotFoundError, ObjectChangedError, ProtocolError

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

STEP_BYTES = 1 << 20
_SCHEME = "file://"


class LocalOrigin:
    """Reads with `preadv` straight into the caller's memory. Safe to use after a fork."""

    name = "origin"
    host = "file"

    def __init__(self, uri: str) -> None:
        self.uri = _SCHEME + str(_path(uri))

    def list(self, uri: str) -> Listing:
        """Return every file under a directory, symbolic links followed; or the one file."""
        root = _path(uri)
        with translated(Asked(_SCHEME + str(root), self.host)):
            blobs = tuple(sorted(map(_blob, _files(root)), key=lambda blob: blob.uri))
        if not blobs:
            raise NotFoundError(Asked(_SCHEME + str(root), self.host).says("no file is there"))
        return blobs

    def list_folder(self, uri: str) -> FolderListing:
        """Return what lies directly in a directory, symbolic links followed."""
        folder = _path(uri)
        with translated(Asked(_SCHEME + str(folder), self.host)):
            return _scan(folder)

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into` from `start`."""
        asked = Asked(blob.uri, self.host, Extent(start, start + len(into)), blob.size)
        with translated(asked), open(_path(blob.uri), "rb", buffering=0) as file:
            _check_version(file.fileno(), blob, asked)
            _read(file.fileno(), start, into, transfer, asked)
            _check_version(file.fileno(), blob, asked)

    def checksum(self, blob: Blob) -> Checksum | None:
        """Return nothing: file systems keep no checksums."""
        return None

    def local_path(self, blob: Blob) -> Path | None:
        """Return where the file lies."""
        return _path(blob.uri)

    def close(self) -> None:
        """Do nothing: no descriptor outlives a read."""


def version_of(stat: os.stat_result) -> str:
    """Return the words that change whenever the file is written or replaced."""
    return f"{stat.st_mtime_ns}-{stat.st_size}-{stat.st_ino}"


def _path(uri: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(uri.removeprefix(_SCHEME))))


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    if not root.exists():
        raise FileNotFoundError("no such file or directory")
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_fail):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                yield path


def _scan(folder: Path) -> FolderListing:
    folders: list[str] = []
    files: list[Listed] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_file():
                    stat = entry.stat()
                    blob = Blob(_SCHEME + entry.path, stat.st_size, version_of(stat))
                    files.append(Listed(blob, stat.st_mtime_ns))
                elif entry.is_dir() and not _leads_up(entry):
                    folders.append(entry.name)
            except FileNotFoundError:
                continue  # removed meanwhile
    return folder_listing(folders, files)


def _leads_up(entry: os.DirEntry[str]) -> bool:
    """Tell whether a folder is a link to one of those above it: a walk would never end."""
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path)
    here = os.path.realpath(os.path.dirname(entry.path))
    return os.path.commonpath([target, here]) == target


def _fail(error: OSError) -> None:
    raise error


def _blob(path: Path) -> Blob:
    stat = path.stat()
    return Blob(_SCHEME + str(path), stat.st_size, version_of(stat))


def _check_version(fd: int, blob: Blob, asked: Asked) -> None:
    if blob.version and version_of(os.fstat(fd)) != blob.version:
        raise ObjectChangedError(asked.says("the file was changed meanwhile"))


def _read(fd: int, start: int, into: memoryview, transfer: Transfer, asked: Asked) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done : done + STEP_BYTES]], start + done)
        if count == 0:
            raise ProtocolError(asked.says(f"the file ended after {done} of {len(into)} bytes"))
        done += count
        transfer.advance(count)
