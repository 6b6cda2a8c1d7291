"""Plain HTTP(S): a URL of a file, or of a folder that holds a model.

HTTP knows no listing. A folder is therefore recognised by what a model has: its safetensors index
names the shards; without one it is `model.safetensors`; and where the server renders an index page,
fsspec reads the links from it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

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
from weightstream.cachefs.origin.generic import datetime_ns
from weightstream.cachefs.origin.http import Client, Request
from weightstream.cachefs.origin.proxies import basic_authorization
from weightstream.cachefs.origin.responses import (
    Answer,
    Asked,
    content_length,
    parse_content_range,
    plain_etag,
    refusal,
    strong_etag,
)
from weightstream.cachefs.origin.tls import make_context
from weightstream.cachefs.origin.urls import Url, public_query, shown, user_info
from weightstream.errors import AccessDeniedError, NotFoundError, ProtocolError
from weightstream.settings import Settings

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
MAX_INDEX_BYTES = 64 << 20
_PARALLEL_STATS = 8


class WebOrigin:
    """Files behind HTTP(S) URLs. Thread-safe; usable in a forked child."""

    name = "origin"

    def __init__(self, uri: str, settings: Settings, options: StorageOptions) -> None:
        parts = urlsplit(uri)
        self.uri = shown(uri).rstrip("/")
        self.host = Url.parse(uri).netloc
        self._home = Url.parse(uri).origin
        # Signed URLs carry their authorization in the query; it goes with every request under this
        # root and is never part of a name.
        self._secret_query = parts.query if public_query(parts.query) != parts.query else ""
        self._headers = _own_headers(uri, options)
        self._fs = FileSystem(parts.scheme, options)
        self._client = Client(
            Pool(
                settings.connect_timeout_s,
                settings.stall_timeout_s,
                tls=lambda: make_context(_verify(options)),
            )
        )

    def list(self, uri: str) -> Listing:
        """Return the one file, or the files of the model in a folder."""
        return tuple(listed.blob for listed in self._files(shown(uri)))

    def list_folder(self, uri: str) -> FolderListing:
        """Return what lies directly in a folder, of the files that `list` finds there.

        The folders of a model whose index names shards in them show no listing of their own: what
        they hold is known from the root.
        """
        folder = shown(uri).rstrip("/") + "/"
        try:
            found = self._files(folder)
        except NotFoundError:
            if folder == f"{self.uri}/":
                raise
            found = self._files(f"{self.uri}/")
        below = [listed for listed in found if listed.blob.uri.startswith(folder)]
        if not below:
            raise NotFoundError(Asked(folder.rstrip("/"), self.host).says("no file is known there"))
        rest = [listed.blob.uri.removeprefix(folder).split("/") for listed in below]
        folders = (unquote(parts[0]) for parts in rest if len(parts) > 1)
        files = (listed for listed, parts in zip(below, rest, strict=True) if len(parts) == 1)
        return folder_listing(folders, files)

    def _files(self, uri: str) -> tuple[Listed, ...]:
        asked = Asked(uri.rstrip("/"), self.host)
        with translated(asked):
            if not uri.endswith("/"):
                answer = self._stat(uri)
                if answer.ok and not _is_folder(uri, answer):
                    return (_listed(uri, answer, asked),)
                if answer.status not in (200, 206, 403, 404):
                    raise refusal(answer, asked, time.time())
            found = self._model(uri.rstrip("/"), asked) or self._index_page(uri, asked)
        if not found:
            raise NotFoundError(
                asked.says(
                    f"neither a file nor a folder with {INDEX_NAME} or {SINGLE_NAME}, "
                    "and the server shows no index of it"
                )
            )
        return found

    def _model(self, folder: str, asked: Asked) -> tuple[Listed, ...]:
        index = self._fetch(f"{folder}/{INDEX_NAME}", MAX_INDEX_BYTES)
        if index.ok:
            names = (INDEX_NAME, *_shard_names(index.body))
        elif index.status in (401, 429) or index.status >= 500:
            raise refusal(index, asked, time.time())
        else:
            names = (SINGLE_NAME,)
        found = self._existing(f"{folder}/{quote(name)}" for name in (*names, *COMPANIONS))
        has_weights = any(_is_weights(listed.blob.name) for listed in found)
        return found if has_weights else ()

    def _index_page(self, uri: str, asked: Asked) -> tuple[Listed, ...]:
        fs = self._fs.get(asked)
        try:
            with translated(asked):
                found = fs.find(uri.rstrip("/") + "/")
        except (NotFoundError, AccessDeniedError):
            return ()
        return self._existing(path for path in found if not path.endswith("/"))

    def _existing(self, uris: Iterable[str]) -> tuple[Listed, ...]:
        with ThreadPoolExecutor(_PARALLEL_STATS, "ws-stat") as pool:
            found = pool.map(self._try_file, sorted(set(uris)))
        return tuple(listed for listed in found if listed is not None)

    def _try_file(self, uri: str) -> Listed | None:
        answer = self._stat(uri)
        asked = Asked(uri, self.host)
        if answer.ok:
            return _listed(uri, answer, asked)
        if answer.status in (403, 404, 410):
            return None  # S3-like servers say 403 for a missing key that may not be listed
        raise refusal(answer, asked, time.time())

    def _stat(self, uri: str) -> Answer:
        """Ask for size and version: by HEAD, or by one byte where HEAD is not enough."""
        answer = self._client.fetch(self._request(uri, "HEAD"), Asked(uri, self.host))
        if answer.ok and content_length(answer.headers) is not None:
            return answer
        if answer.status in (404, 410):
            return answer
        request = self._request(uri, headers={"Range": "bytes=0-0"})
        return self._client.fetch(request, Asked(uri, self.host), limit=1)

    def _fetch(self, uri: str, limit: int) -> Answer:
        return self._client.fetch(self._request(uri), Asked(uri, self.host), limit)

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into` from `start`."""
        if not into:
            return
        extent = Extent(start, start + len(into))
        asked = Asked(blob.uri, self.host, extent, blob.size, blob.version)
        request = self._request(blob.uri, headers=conditions(blob))
        self._client.read_range(request, asked, extent, into, transfer)

    def _request(
        self, uri: str, method: str = "GET", headers: Mapping[str, str] | None = None
    ) -> Request:
        if self._secret_query:
            uri = urlunsplit(urlsplit(uri)._replace(query=self._secret_query))
        return Request(Url.parse(uri), method, headers or {}, self._authorize)

    def _authorize(self, method: str, url: Url, headers: dict[str, str]) -> Mapping[str, str]:
        return {**headers, **self._headers} if url.origin == self._home else headers

    def checksum(self, blob: Blob) -> Checksum | None:
        """Return nothing: HTTP has no full-object CRC."""
        return None

    def local_path(self, blob: Blob) -> Path | None:
        """Return nothing: the file lies elsewhere."""
        return None

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()


def conditions(blob: Blob) -> dict[str, str]:
    """Return the headers that make the server refuse another version of the file."""
    etag = strong_etag(blob.version)
    if _is_date(blob.version):
        return {"If-Unmodified-Since": blob.version}
    return {"If-Match": etag} if etag else {}


def _is_date(version: str) -> bool:
    try:
        return version.endswith("GMT") and bool(parsedate_to_datetime(version))
    except ValueError:
        return False


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", INDEX_NAME))


def _listed(uri: str, answer: Answer, asked: Asked) -> Listed:
    return Listed(_blob(uri, answer, asked), _modified_ns(answer))


def _modified_ns(answer: Answer) -> int | None:
    try:
        moment = parsedate_to_datetime(answer.headers.get("Last-Modified", ""))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return datetime_ns(moment)


def _blob(uri: str, answer: Answer, asked: Asked) -> Blob:
    size = content_length(answer.headers)
    if answer.status == 206:
        parsed = parse_content_range(answer.headers.get("Content-Range", ""))
        size = parsed.total if parsed else None
    if size is None:
        raise ProtocolError(asked.says("the server does not say how long the file is"))
    version = plain_etag(answer.headers.get("ETag")) or answer.headers.get("Last-Modified", "")
    return Blob(uri, size, version)


def _is_folder(uri: str, answer: Answer) -> bool:
    if answer.url.target.partition("?")[0].endswith("/"):
        return True
    is_page = answer.headers.get("Content-Type", "").startswith("text/html")
    return is_page and not uri.endswith((".html", ".htm"))


def _shard_names(index: bytes) -> tuple[str, ...]:
    """Return the files that an index names; what is wrong with it is for the loader to say."""
    try:
        names = json.loads(index)["weight_map"].values()
        return tuple(sorted({name for name in names if _is_plain(name)}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()


def _is_plain(name: object) -> bool:
    if not isinstance(name, str) or not name or name.startswith("/"):
        return False
    return ".." not in name.split("/") and "://" not in name


def _own_headers(uri: str, options: StorageOptions) -> Mapping[str, str]:
    """Collect the headers that the user wants sent: URL user info and fsspec's own options."""
    headers: dict[str, str] = {}
    client = options.get("client_kwargs")
    sources = [client.get("headers") if isinstance(client, Mapping) else None]
    for source in (*sources, options.get("headers")):
        if isinstance(source, Mapping):
            headers.update({str(name): str(value) for name, value in source.items()})
    authorization = basic_authorization(user_info(urlsplit(uri)))
    return {**headers, "Authorization": authorization} if authorization else headers


def _verify(options: StorageOptions) -> Any:
    for key in ("verify", "ssl"):
        if key in options:
            return options[key]
    return None
