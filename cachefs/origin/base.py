"""What the rest of weightstream may ask of an origin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from weightstream.cachefs.blob import Blob

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

Listing: TypeAlias = tuple[Blob, ...]
"""The files of a model, sorted by URI."""

StorageOptions: TypeAlias = Mapping[str, object]
"""Keyword arguments for the fsspec file system of the origin, as fsspec itself takes them."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One file of a folder."""

    blob: Blob
    modified_ns: int | None
    """Wall clock, where the origin says it."""


@dataclass(frozen=True, slots=True)
class FolderListing:
    """What lies directly in one folder, names as the origin has them: some cannot be files."""

    folders: tuple[str, ...]
    """Names, sorted. Of odd keys (`a//b`) one may be empty, `.` or `..`."""
    files: tuple[Listed, ...]
    """Sorted by URI; the last component of each is the name."""


def folder_listing(folders: Iterable[str], files: Iterable[Listed]) -> FolderListing:
    """Put a listing in order."""
    by_uri = sorted(files, key=lambda listed: listed.blob.uri)
    return FolderListing(tuple(sorted(set(folders))), tuple(by_uri))


@dataclass(frozen=True, slots=True)
class Checksum:
    """The origin's own checksum of a whole file."""

    algorithm: Literal["crc64nvme", "crc32c"]
    value: int


class Origin(Protocol):
    """Where a model lives. Satisfies `Source`; thread-safe; usable in a forked child."""

    name: str
    uri: str
    """The root as the user gave it, without credentials and trailing slash."""

    @property
    def host(self) -> str:
        """Whom messages name: `127.0.0.1:9000`, `s3.amazonaws.com`, `file`."""
        ...

    def list(self, uri: str) -> Listing:
        """Return every file under the prefix `uri`, or the one file that it names."""
        ...

    def list_folder(self, uri: str) -> FolderListing:
        """Return what lies directly under `uri`, asked for anew; `NotFoundError` if nothing does.

        A bucket or directory that exists is never missing, however empty. One file is no folder.
        """
        ...

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into` from `start`; see `Source.read_into`."""
        ...

    def checksum(self, blob: Blob) -> Checksum | None:
        """Return the checksum that the origin keeps of the whole file, if it keeps one."""
        ...

    def local_path(self, blob: Blob) -> Path | None:
        """Return where the file lies, when it is on a file system of this machine."""
        ...

    def close(self) -> None:
        """Close idle connections. Transfers that run are not touched."""
        ...
