"""Models on the Hugging Face Hub: `hf://owner/name[@revision][/path]`.

The Hub answers a file's URL with a redirect to a signed URL on its CDN. The CDN's objects are named
by content, so the version is checked once, against the ETag that comes with the redirect, and the
signed URL serves all further ranges until it is about to expire.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from weightstream.cachefs.origin.connections import Pool
from weightstream.cachefs.origin.failures import translated
from weightstream.cachefs.origin.forks import forget_in_child
from weightstream.cachefs.origin.fs import FileSystem
from weightstream.cachefs.origin.generic import folders_of, last_name, modified_ns
from weightstream.cachefs.origin.http import Client, Request
from weightstream.cachefs.origin.responses import REDIRECTS, Answer, Asked, plain_etag, refusal
from weightstream.cachefs.origin.tls import make_context
from weightstream.cachefs.origin.urls import Url
from weightstream.errors import AccessDeniedError, NotFoundError, ObjectChangedError
from weightstream.settings import Settings

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

_SCHEME = "hf://"
# Signed URLs live for an hour; one that turns out to be older is refused and asked for again.
PLACE_TTL_S = 1800.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where one blob can be read."""

    url: Url = field(repr=False)  # signed
    until_s: float
    etag: str
    """What ranges must carry: the version where the Hub itself serves them, nothing on the CDN."""


class HubOrigin:
    """A repository of the Hub, or a folder of it. Thread-safe; usable in a forked child."""

    name = "origin"

    def __init__(self, uri: str, settings: Settings, options: StorageOptions) -> None:
        self.uri = uri.rstrip("/")
        self._host = "huggingface.co"
        self._fs = FileSystem("hf", options)
        self._client = Client(
            Pool(
                settings.connect_timeout_s,
                settings.stall_timeout_s,
                tls=lambda: make_context(None),
            )
        )
        self.forget()
        forget_in_child(self)

    @property
    def host(self) -> str:
        """Return the Hub's name; before its endpoint is known, the usual one."""
        return self._host

    def forget(self) -> None:
        """Start with an empty memory in a forked child."""
        self._lock = threading.Lock()
        self._places: dict[Blob, Place] = {}

    def list(self, uri: str) -> Listing:
        """Return every file of a repository or folder, or the one file."""
        asked = Asked(uri.rstrip("/"), self.host)
        fs = self._fs.get(asked)
        with translated(asked):
            fs.invalidate_cache()
            found = fs.find(uri.removeprefix(_SCHEME).rstrip("/"), detail=True)
        files = (info for info in found.values() if info["type"] == "file")
        blobs = tuple(sorted(map(_blob, files), key=lambda blob: blob.uri))
        if not blobs:
            raise NotFoundError(asked.says("no file is there"))
        return blobs

    def list_folder(self, uri: str) -> FolderListing:
        """Return what lies directly in a repository or a folder of it."""
        asked = Asked(uri.rstrip("/"), self.host)
        fs = self._fs.get(asked)
        path = uri.removeprefix(_SCHEME).rstrip("/")
        with translated(asked):
            found = fs.ls(path, detail=True, refresh=True)
            files = [info for info in found if info["type"] == "file"]
            if len(files) == 1 and files[0]["name"] == fs.resolve_path(path).unresolve():
                raise NotFoundError(asked.says("a file, not a folder"))
            listed = [Listed(_blob(info), modified_ns(info)) for info in files]
        return folder_listing(map(last_name, folders_of(found)), listed)

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into` from `start`."""
        if not into:
            return
        extent = Extent(start, start + len(into))
        asked = Asked(blob.uri, self.host, extent, blob.size)
        place, known = self._place(blob, asked)
        try:
            self._read(place, extent, into, transfer, asked)
        except AccessDeniedError:
            if not known:
                raise
            with self._lock:
                self._places.pop(blob, None)  # the signed URL has expired
            self._read(self._place(blob, asked)[0], extent, into, transfer, asked)

    def _read(
        self, place: Place, extent: Extent, into: memoryview, transfer: Transfer, asked: Asked
    ) -> None:
        request = Request(place.url, authorize=self._authorizer(asked))
        asked = replace(asked, host=place.url.netloc, version=place.etag)
        self._client.read_range(request, asked, extent, into, transfer)

    def _place(self, blob: Blob, asked: Asked) -> tuple[Place, bool]:
        """Return where the blob can be read, and whether that was known already."""
        place = self._places.get(blob)
        if place is not None and time.monotonic() < place.until_s:
            return place, True
        place = self._resolve(blob, asked)
        with self._lock:
            self._places[blob] = place
        return place, False

    def _resolve(self, blob: Blob, asked: Asked) -> Place:
        with translated(asked):
            url = Url.parse(self._fs.get(asked).url(blob.uri.removeprefix(_SCHEME)))
        until_s = time.monotonic() + PLACE_TTL_S
        request = Request(url, "HEAD", authorize=self._authorizer(asked))
        # At most one hop inside the Hub (a renamed repository); the next one leads to the CDN.
        for _ in range(3):
            answer = self._client.fetch(request, asked, hops=0)
            target = _redirect(answer)
            if _content_id(answer):
                _check_content(answer, blob, asked)
                return Place(target or request.url, until_s, "" if target else blob.version)
            if target is None:
                raise refusal(answer, asked, time.time())
            request = replace(request, url=target)
        raise NotFoundError(asked.says("the Hub redirects without naming the content"))

    def _authorizer(self, asked: Asked) -> Any:
        api = self._fs.get(asked)._api
        hub = Url.parse(api.endpoint)
        home, self._host = hub.origin, hub.netloc
        own = {k: v for k, v in api._build_hf_headers().items() if k.lower() == "authorization"}

        def authorize(method: str, url: Url, headers: dict[str, str]) -> Mapping[str, str]:
            return {**headers, **own} if url.origin == home else headers

        return authorize

    def checksum(self, blob: Blob) -> Checksum | None:
        """Return nothing: the Hub keeps SHA-256, no CRC."""
        return None

    def local_path(self, blob: Blob) -> Path | None:
        """Return nothing: the file lies elsewhere."""
        return None

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()


def _redirect(answer: Answer) -> Url | None:
    location = answer.headers.get("Location")
    return answer.url.join(location) if answer.status in REDIRECTS and location else None


def _content_id(answer: Answer) -> str:
    """Return the Hub's name for the content: SHA-256 of large files, git's hash of small ones."""
    if not (answer.ok or answer.status in REDIRECTS):
        return ""
    linked = answer.headers.get("X-Linked-ETag")
    etag = linked or answer.headers.get("ETag")
    return plain_etag(etag).removeprefix("W/")


def _check_content(answer: Answer, blob: Blob, asked: Asked) -> None:
    if blob.version and _content_id(answer) != blob.version:
        raise ObjectChangedError(asked.says("the repository holds another version of it now"))


_HASH = re.compile(r"[0-9a-f]{40,64}\Z")


def _blob(info: Mapping[str, Any]) -> Blob:
    lfs = info.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", None)
    version = str(sha256 or info.get("blob_id") or "")
    return Blob(
        _SCHEME + str(info["name"]), int(info["size"]), version if _HASH.match(version) else ""
    )
