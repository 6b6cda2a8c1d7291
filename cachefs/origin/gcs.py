"""Google Cloud Storage: `gs://bucket/key`.

gcsfs lists and finds credentials; the bytes come over the JSON API's media URL. The generation in
that URL pins the version: a replaced object answers 404 for it.
"""

from __future__ import annotations

import logging
from base64 import b64decode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.origin.base import (
    Checksum,
    FolderListing,
    Listed,
    Listing,
    StorageOptions,
    folder_listing,
)
from weightstream.cachefs.origin.connections import Pool
from weightstream.cachefs.origin.failures import translated
from weightstream.cachefs.origin.fs import FileSystem
from weightstream.cachefs.origin.generic import last_name, modified_ns
from weightstream.cachefs.origin.http import Authorize, Client, Request
from weightstream.cachefs.origin.responses import Asked
from weightstream.cachefs.origin.tls import make_context
from weightstream.cachefs.origin.urls import Url
from weightstream.errors import NotFoundError, ObjectChangedError, WeightstreamError
from weightstream.settings import Settings

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

log = logging.getLogger(__name__)

_SCHEME = "gs://"


class GcsOrigin:
    """A bucket or a prefix of it. Thread-safe; usable in a forked child."""

    name = "origin"

    def __init__(self, uri: str, settings: Settings, options: StorageOptions) -> None:
        self.uri = _SCHEME + uri.partition("://")[2].rstrip("/")
        self.host = "storage.googleapis.com"
        self._timeout_s = settings.deadline_s
        self._fs = FileSystem("gs", {"use_listings_cache": False, **options})
        self._client = Client(
            Pool(
                settings.connect_timeout_s,
                settings.stall_timeout_s,
                tls=lambda: make_context(None),
            )
        )

    def list(self, uri: str) -> Listing:
        """Return every object under a prefix, or the one object."""
        path = uri.partition("://")[2].rstrip("/")
        asked = Asked(_SCHEME + path, self.host)
        fs = self._fs.get(asked)
        with translated(asked):
            fs.invalidate_cache()
            found = fs.find(path, detail=True)
        files = [info for name, info in found.items() if not name.endswith("/")]
        blobs = tuple(sorted(map(_blob, files), key=lambda blob: blob.uri))
        if not blobs:
            raise NotFoundError(asked.says("no object is there"))
        return blobs

    def list_folder(self, uri: str) -> FolderListing:
        """Return what lies directly under a prefix."""
        path = uri.partition("://")[2].rstrip("/")
        asked = Asked(_SCHEME + path, self.host)
        fs = self._fs.get(asked)
        with translated(asked):
            found, prefixes = self._one_level(fs, path)
        if not found and not prefixes and "/" in path:
            raise NotFoundError(asked.says("no object is there"))
        files = (
            Listed(_blob(info), modified_ns(info))
            for info in found
            if not str(info["name"]).endswith("/")
        )
        return folder_listing(map(last_name, prefixes), files)

    def _one_level(self, fs: Any, path: str) -> tuple[Sequence[Mapping[str, Any]], Sequence[str]]:
        from fsspec.asyn import sync

        found, prefixes = sync(fs.loop, fs._do_list_objects, path, timeout=self._timeout_s)
        return found, prefixes

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into` from `start`."""
        if not into:
            return
        extent = Extent(start, start + len(into))
        asked = Asked(blob.uri, self.host, extent, blob.size)
        with translated(asked):
            fs = self._fs.get(asked)
            url = media_url(fs._location, blob)
        request = Request(url, authorize=_authorizer(fs, url))
        try:
            self._client.read_range(request, asked, extent, into, transfer)
        except NotFoundError as error:
            if not blob.version:
                raise
            gone = f"generation {blob.version} is not there any more"
            raise ObjectChangedError(asked.says(gone)) from error

    def checksum(self, blob: Blob) -> Checksum | None:
        """Ask for the CRC32C of the object; None on any failure."""
        asked = Asked(blob.uri, self.host)
        try:
            with translated(asked):
                info = self._fs.get(asked).info(blob.uri)
                digest = b64decode(str(info.get("crc32c") or ""), validate=True)
                same = str(info.get("generation", "")) == blob.version
        except (WeightstreamError, ValueError) as error:
            log.debug("no checksum: %s", error)
            return None
        if not same or len(digest) != 4:
            return None
        return Checksum("crc32c", int.from_bytes(digest, "big"))

    def local_path(self, blob: Blob) -> Path | None:
        """Return nothing: objects lie elsewhere."""
        return None

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()


def _authorizer(fs: Any, home: Url) -> Authorize:
    def authorize(method: str, url: Url, headers: dict[str, str]) -> Mapping[str, str]:
        if url.origin == home.origin:
            fs.credentials.apply(headers)  # renews the token under a lock of its own
        return headers

    return authorize


def media_url(location: str, blob: Blob) -> Url:
    """Return the URL of one generation of an object."""
    bucket, _, key = blob.uri.removeprefix(_SCHEME).partition("/")
    pinned = f"&generation={blob.version}" if blob.version else ""
    path = f"b/{quote(bucket, safe='')}/o/{quote(key, safe='')}?alt=media{pinned}"
    return Url.parse(f"{location}/download/storage/v1/{path}")


def _blob(info: Mapping[str, Any]) -> Blob:
    return Blob(_SCHEME + str(info["name"]), int(info["size"]), str(info.get("generation") or ""))
