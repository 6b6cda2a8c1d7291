"""S3 and everything that speaks its protocol.

s3fs and botocore do what they are best at: finding credentials, regions and endpoints, and listing.
The bytes take a path of our own: botocore's signer, our connections. What that path does not speak
(S3 Express, access point ARNs, SSE-C, other signature versions) is read through s3fs.
"""

from __future__ import annotations

import logging
import time
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import replace
from http.client import HTTPMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.origin.base import (
    Checksum,
    FolderListing,
    Listing,
    StorageOptions,
)
from weightstream.cachefs.origin.connections import Pool
from weightstream.cachefs.origin.failures import translated
from weightstream.cachefs.origin.fs import FileSystem
from weightstream.cachefs.origin.generic import read_with_fsspec
from weightstream.cachefs.origin.http import Client, Request
from weightstream.cachefs.origin.interrupt import Interrupt
from weightstream.cachefs.origin.responses import Answer, Asked, plain_etag, refusal, strong_etag
from weightstream.cachefs.origin.s3_access import Access, AccessBook, proxy_for, tls_context
from weightstream.cachefs.origin.s3_listing import (
    MAX_PAGE_BYTES,
    list_direct,
    list_through_s3fs,
)
from weightstream.cachefs.origin.urls import Url
from weightstream.errors import (
    CredentialsError,
    NotFoundError,
    OriginError,
    UsageError,
    WeightstreamError,
)
from weightstream.settings import Settings

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

log = logging.getLogger(__name__)

_SCHEME = "s3://"
_DIGESTS: tuple[tuple[Literal["crc64nvme", "crc32c"], int], ...] = (("crc64nvme", 8), ("crc32c", 4))


class S3Origin:
    """A bucket or a prefix of it. Thread-safe; usable in a forked child."""

    name = "origin"

    def __init__(self, uri: str, settings: Settings, options: StorageOptions) -> None:
        bucket, key = split(uri)
        self.uri = f"{_SCHEME}{bucket}/{key}".rstrip("/")
        self._timeout_s = settings.deadline_s
        self._fs = FileSystem("s3", _bounded(options, settings))
        self._access = AccessBook(self._fs)
        self._host = ""
        asked = Asked(self.uri, "s3")
        self._client = Client(
            Pool(
                settings.connect_timeout_s,
                settings.stall_timeout_s,
                tls=lambda: tls_context(self._fs, asked),
                proxy_for=lambda url: proxy_for(self._fs, asked, url),
            )
        )

    @property
    def host(self) -> str:
        """Return the endpoint; before it is known, the name of the service."""
        return self._host or "s3"

    def list(self, uri: str) -> Listing:
        """Return every object under a prefix, or the one object."""
        bucket, key = split(uri)
        asked = self._asked(uri.rstrip("/"))
        with translated(asked):
            self._reach(bucket, asked)
            asked = self._asked(asked.uri)
        with translated(asked):
            found = self._find(f"{bucket}/{key}", asked)
        files = [info for path, info in found.items() if not path.endswith("/")]
        blobs = tuple(sorted(map(_blob, files), key=lambda blob: blob.uri))
        if not blobs:
            raise NotFoundError(asked.says("no object is there"))
        return blobs

    def _find(self, path: str, asked: Asked) -> dict[str, Any]:
        from fsspec.asyn import sync

        fs = self._fs.get(asked)
        found = sync(fs.loop, fs._find, path, detail=True, timeout=self._timeout_s)
        assert isinstance(found, dict)
        return found

    def list_folder(self, uri: str) -> FolderListing:
        """Return what lies directly under a prefix, with credentials renewed once if expired."""
        bucket, key = split(uri.rstrip("/"))
        asked = self._asked(uri.rstrip("/"))
        with translated(asked):
            access = self._reach(bucket, asked)
        asked = self._asked(asked.uri)
        try:
            if access.direct:
                return self._list_direct(access, bucket, key, asked)
        except CredentialsError:
            with translated(asked):
                access = self._access.renew(bucket, asked, refused=access)
            return self._list_direct(access, bucket, key, asked)
        except OriginError as error:
            if type(error) is not OriginError:
                raise
            log.debug("listed through s3fs: %s", error)  # which follows a bucket to its region
        with translated(asked):
            return list_through_s3fs(self._fs.get(asked), bucket, key, asked, self._timeout_s)

    def _list_direct(self, access: Access, bucket: str, key: str, asked: Asked) -> FolderListing:
        def ask(query: str, interrupt: Interrupt) -> Answer:
            request = Request(access.listing_url(query), "GET", access.headers, authorize)
            return self._client.fetch(request, asked, MAX_PAGE_BYTES, interrupt=interrupt)

        authorize = access.authorize(asked)
        return list_direct(ask, bucket, key, asked, self._timeout_s)

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into` from `start`, with credentials renewed once if they have expired."""
        if not into:
            return
        extent = Extent(start, start + len(into))
        bucket, key = split(blob.uri)
        asked = Asked(blob.uri, self.host, extent, blob.size, blob.version)
        with translated(asked):
            access = self._reach(bucket, asked)
        asked = replace(asked, host=self.host)
        if not access.direct:
            read_with_fsspec(self._fs, f"{bucket}/{key}", blob, extent, into, transfer, asked)
            return
        try:
            self._read(access, key, blob, extent, into, transfer, asked)
        except CredentialsError:
            with translated(asked):
                access = self._access.renew(bucket, asked, refused=access)
            self._read(access, key, blob, extent, into, transfer, asked)

    def _read(
        self,
        access: Access,
        key: str,
        blob: Blob,
        extent: Extent,
        into: memoryview,
        transfer: Transfer,
        asked: Asked,
    ) -> None:
        etag = strong_etag(blob.version)
        headers = {**access.headers, "If-Match": etag} if etag else access.headers
        request = Request(access.url(key), "GET", headers, access.authorize(asked))
        self._client.read_range(request, asked, extent, into, transfer)

    def checksum(self, blob: Blob) -> Checksum | None:
        """Ask for the checksum of the whole object; None if S3 has none, or on any failure."""
        bucket, key = split(blob.uri)
        asked = self._asked(blob.uri)
        try:
            with translated(asked):
                access = self._reach(bucket, asked)
                answer = self._head(access, access.url(key), asked)
                if not answer.ok:
                    raise refusal(answer, asked, time.time())
        except WeightstreamError as error:
            log.debug("no checksum: %s", error)
            return None
        if blob.version and plain_etag(answer.headers.get("ETag")) != blob.version:
            return None
        return parse_checksum(answer.headers)

    def _head(self, access: Access, url: Url, asked: Asked) -> Answer:
        headers = {**access.headers, "x-amz-checksum-mode": "ENABLED"}
        return self._client.fetch(Request(url, "HEAD", headers, access.authorize(asked)), asked)

    def prepare(self, uri: str) -> None:
        """Import the SDK, find credentials and make a client: 0.18 CPU s that a load need not pay.

        Asks nothing of the bucket.
        """
        bucket, _ = split(uri)
        asked = self._asked(uri)
        with translated(asked):
            self._reach(bucket, asked)

    def plain_url(self, blob: Blob) -> str:
        """Return the object's URL, unsigned: of use where the bucket is public."""
        bucket, key = split(blob.uri)
        asked = self._asked(blob.uri)
        with translated(asked):
            return str(self._reach(bucket, asked).url(key))

    def local_path(self, blob: Blob) -> Path | None:
        """Return nothing: objects lie elsewhere."""
        return None

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()

    def _asked(self, uri: str) -> Asked:
        return Asked(uri, self.host)

    def _reach(self, bucket: str, asked: Asked) -> Access:
        access = self._access.get(bucket, asked)
        self._host = Url.parse(access.base).netloc
        return access


def split(uri: str) -> tuple[str, str]:
    """Return bucket and key of `s3://bucket/key`."""
    scheme, _, path = uri.partition("://")
    bucket, _, key = path.partition("/")
    if scheme not in ("s3", "s3a") or not bucket:
        raise UsageError(f"{uri}: not an S3 URL: s3://bucket/key is expected")
    return bucket, key


def parse_checksum(headers: HTTPMessage) -> Checksum | None:
    """Read the full-object checksum from the answer to a HEAD request."""
    kind = headers.get("x-amz-checksum-type", "FULL_OBJECT")
    for algorithm, length in _DIGESTS:
        text = headers.get(f"x-amz-checksum-{algorithm}")
        if text is None or kind != "FULL_OBJECT" or "-" in text:
            continue  # "digest-3" is a checksum of the checksums of 3 parts
        try:
            digest = b64decode(text, validate=True)
        except ValueError:
            continue
        if len(digest) == length:
            return Checksum(algorithm, int.from_bytes(digest, "big"))
    return None


def _blob(info: Mapping[str, Any]) -> Blob:
    return Blob(_SCHEME + str(info["name"]), int(info["size"]), plain_etag(info.get("ETag")))


def _bounded(options: StorageOptions, settings: Settings) -> StorageOptions:
    """Add our time limits where the user set none: botocore's own wait for minutes."""
    given = options.get("config_kwargs")
    config: dict[str, object] = {
        "connect_timeout": settings.connect_timeout_s,
        "read_timeout": settings.stall_timeout_s,
        "retries": {"max_attempts": 2},
        **(given if isinstance(given, Mapping) else {}),
    }
    return {"use_listings_cache": False, **options, "config_kwargs": config}
