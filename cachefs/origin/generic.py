"""Everything else that fsspec knows, read through fsspec's own range reads.

Slower than the direct path (each piece is a `bytes` object first), but complete: Azure, SFTP, HDFS,
WebDAV, memory... The origin cannot be asked for one version, so the version is compared after each
piece, before anyone hears of its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.origin.base import (
    Checksum,
    FolderListing,
    Listed,
    Listing,
    StorageOptions,
    folder_listing,
)
from weightstream.cachefs.origin.failures import translated
from weightstream.cachefs.origin.fs import FileSystem
from weightstream.cachefs.origin.responses import Asked, plain_etag
from weightstream.errors import NotFoundError, ObjectChangedError, ProtocolError
from weightstream.settings import Settings

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

PIECE_BYTES = 4 << 20
_VERSION_KEYS = (
    *("ETag", "etag", "generation", "version_id", "versionId"),
    *("content_md5", "md5", "md5Hash", "crc32c", "sha256", "checksum"),
    *("mtime", "LastModified", "last_modified", "updated", "modified", "created"),
)


class GenericOrigin:
    """Any fsspec file system. Thread-safe as far as that file system is."""

    name = "origin"

    def __init__(self, uri: str, settings: Settings, options: StorageOptions) -> None:
        protocol, _, path = uri.partition("://")
        self.uri = uri.rstrip("/")
        self.host = path.partition("/")[0].rpartition("@")[2] or protocol
        self._fs = FileSystem(protocol, options)
        self._timeout_s = settings.deadline_s

    def list(self, uri: str) -> Listing:
        """Return every file under a prefix, or the one file."""
        asked = Asked(uri.rstrip("/"), self.host)
        fs = self._fs.get(asked)
        with translated(asked):
            fs.invalidate_cache()
            found = fs.find(fs._strip_protocol(uri), detail=True)
            blobs = (self._blob(fs, path, info) for path, info in found.items())
            listing = tuple(sorted(blobs, key=lambda blob: blob.uri))
        if not listing:
            raise NotFoundError(asked.says("no file is there"))
        return listing

    def list_folder(self, uri: str) -> FolderListing:
        """Return what lies directly under a prefix."""
        asked = Asked(uri.rstrip("/"), self.host)
        fs = self._fs.get(asked)
        with translated(asked):
            path = str(fs._strip_protocol(uri)).rstrip("/")
            fs.invalidate_cache(path or None)  # not every kind knows `refresh`
            found = list_one_level(fs, path, self._timeout_s)
            if any(info["type"] != "directory" and _same(info, path) for info in found):
                raise NotFoundError(asked.says("a file, not a folder"))
            below = [info for info in found if not _same(info, path)]
            files = [
                Listed(self._blob(fs, str(info["name"]), info), modified_ns(info))
                for info in below
                if info["type"] != "directory"
            ]
        return folder_listing(map(last_name, folders_of(below)), files)

    def _blob(self, fs: Any, path: str, info: Mapping[str, Any]) -> Blob:
        return Blob(str(fs.unstrip_protocol(path)), int(info["size"] or 0), version_of(info))

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into` from `start`."""
        extent = Extent(start, start + len(into))
        asked = Asked(blob.uri, self.host, extent, blob.size)
        path = str(self._fs.get(asked)._strip_protocol(blob.uri))
        read_with_fsspec(self._fs, path, blob, extent, into, transfer, asked)

    def checksum(self, blob: Blob) -> Checksum | None:
        """Return nothing: fsspec knows no full-object CRC."""
        return None

    def local_path(self, blob: Blob) -> Path | None:
        """Return nothing: the file lies elsewhere."""
        return None

    def close(self) -> None:
        """Do nothing: fsspec owns the connections."""


def list_one_level(fs: Any, path: str, timeout_s: float) -> Sequence[Mapping[str, Any]]:
    """Return fsspec's details of what lies directly under `path`, within a time if it can."""
    if not getattr(fs, "async_impl", False):
        found = fs.ls(path, detail=True, refresh=True)
    else:
        from fsspec.asyn import sync

        found = sync(fs.loop, fs._ls, path, detail=True, refresh=True, timeout=timeout_s)
    assert isinstance(found, list)
    return found


def folders_of(found: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the paths of the folders in fsspec's details."""
    return (str(info["name"]) for info in found if info["type"] == "directory")


def last_name(path: str) -> str:
    """Return the last component of a path of fsspec's, which ends folders with a slash at times."""
    return path.removesuffix("/").rpartition("/")[2]


def _same(info: Mapping[str, Any], path: str) -> bool:
    return str(info["name"]).strip("/") == path.strip("/")


def read_with_fsspec(
    fs: FileSystem,
    path: str,
    blob: Blob,
    extent: Extent,
    into: memoryview,
    transfer: Transfer,
    asked: Asked,
) -> None:
    """Fill `into` with one range by fsspec's own reads, and check that the version still holds."""
    system = fs.get(asked)
    done = 0
    with translated(asked):
        while done < len(into):
            stop = min(done + PIECE_BYTES, len(into))
            piece = system.cat_file(path, start=extent.start + done, end=extent.start + stop)
            if len(piece) != stop - done:
                got = done + len(piece)
                raise ProtocolError(asked.says(f"the read ended after {got} of {len(into)} bytes"))
            into[done:stop] = piece
            _check_version(system, path, blob, asked)
            transfer.advance(stop - done)
            done = stop


def _check_version(system: Any, path: str, blob: Blob, asked: Asked) -> None:
    system.invalidate_cache(path)
    now = system.info(path)
    if (int(now["size"] or 0), version_of(now)) != (blob.size, blob.version):
        raise ObjectChangedError(asked.says("the file was replaced meanwhile"))


def version_of(info: Mapping[str, Any]) -> str:
    """Return the first word in fsspec's details that changes with the content."""
    for key in _VERSION_KEYS:
        value = info.get(key)
        if value:
            if isinstance(value, datetime):
                return str(value.timestamp())  # some listings say the same in seconds
            return value.hex() if isinstance(value, bytes | bytearray) else plain_etag(str(value))
    return ""


_MODIFIED_KEYS = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")


def modified_ns(info: Mapping[str, Any]) -> int | None:
    """Return when fsspec's details say that the file was written; None where they do not."""
    for key in _MODIFIED_KEYS:
        value = info.get(key)
        if isinstance(value, datetime):
            return datetime_ns(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return int(value * 1e9)
        if isinstance(value, str):
            try:
                return datetime_ns(datetime.fromisoformat(value))
            except ValueError:
                continue
    return None


def datetime_ns(moment: datetime) -> int:
    """Return nanoseconds since 1970, exactly; a moment without a zone is taken for UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - _EPOCH) // _MICROSECOND * 1000


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
