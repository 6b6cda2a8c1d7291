"""Everything else that fsspec knows, read through fsspec's own range reads.

Slower than the direct path (each piece is a `bytes` object first), but complete: Azure, SFTP, HDFS,
WebDAV, memory... The origin cannot be asked for one version, so the version is compared after each
piece, before anyone hears of its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.origin.base import Checksum, Listing, StorageOptions
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
