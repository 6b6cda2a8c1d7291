"""One folder of a bucket: ListObjectsV2 over our own connections, or through s3fs.

botocore takes 64 us of CPU for each key that it lists (measured: 6.4 s for a folder of 100,000,
and the interpreter lock with it, at each listing); parsing the pages here takes 6 us. It also
decodes names that are not UTF-8 to replacement characters, so that two keys may get one name; here
they keep their bytes as surrogates, and whoever shows names can tell. What the data plane does not
speak is listed through s3fs.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from random import random
from typing import Any
from urllib.parse import quote, unquote_plus
from xml.etree import ElementTree

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin.base import FolderListing, Listed, folder_listing
from weightstream.cachefs.origin.generic import datetime_ns
from weightstream.cachefs.origin.interrupt import Interrupt
from weightstream.cachefs.origin.responses import Answer, Asked, plain_etag, refusal
from weightstream.errors import (
    NotFoundError,
    OriginError,
    ProtocolError,
    ThrottledError,
    UnavailableError,
)

# 1,000 keys of 1,024 bytes, each escaped to three, and what stands around them.
MAX_PAGE_BYTES = 16 << 20
MAX_ATTEMPTS = 4  # of each page; they wait 0.1 to 1.3 s in all
LONGEST_WAIT_S = 5.0
# A folder with more is given up: half a kilobyte each, and a server that goes in circles ends here.
MAX_ENTRIES = 2_000_000
_S3FS_STEP = 1000

Ask = Callable[[str, Interrupt], Answer]
"""Sends a GET for the bucket with that query string."""


@dataclass(frozen=True, slots=True)
class Page:
    """Up to 1,000 entries of a listing; keys are whole."""

    prefixes: tuple[str, ...]
    files: tuple[Listed, ...]
    next_token: str
    """Empty on the last page."""


def list_direct(ask: Ask, bucket: str, key: str, asked: Asked, deadline_s: float) -> FolderListing:
    """List what lies under the folder `key`; each page may take `deadline_s`."""
    prefix = f"{key}/" if key else ""
    return _listing(_pages(ask, bucket, prefix, asked, deadline_s), prefix, asked)


def _listing(pages: Iterator[Page], prefix: str, asked: Asked) -> FolderListing:
    folders: list[str] = []
    files: list[Listed] = []
    exists = not prefix  # a bucket that answers is there, however empty
    for page in pages:
        if len(folders) + len(files) > MAX_ENTRIES:
            raise ProtocolError(asked.says(f"more than {MAX_ENTRIES} entries in one folder"))
        exists = exists or bool(page.prefixes or page.files)
        folders += [name.removeprefix(prefix).removesuffix("/") for name in page.prefixes]
        # A key that ends in a slash is the marker that some tools put for a folder.
        files += [listed for listed in page.files if not listed.blob.uri.endswith("/")]
    if not exists:
        raise NotFoundError(asked.says("no object is there"))
    return folder_listing(folders, files)


def _pages(ask: Ask, bucket: str, prefix: str, asked: Asked, deadline_s: float) -> Iterator[Page]:
    token = ""
    while True:
        page = _page(ask, page_query(prefix, token), bucket, asked, deadline_s)
        yield page
        if not page.next_token:
            return
        if page.next_token == token:
            raise ProtocolError(asked.says("the listing goes in circles"))
        token = page.next_token


def _page(ask: Ask, query: str, bucket: str, asked: Asked, deadline_s: float) -> Page:
    started_s = time.monotonic()
    for failures in range(1, MAX_ATTEMPTS + 1):
        left_s = deadline_s - (time.monotonic() - started_s)
        try:
            return _attempt(ask, query, bucket, asked, left_s)
        except OriginError as error:
            wait_s = _delay_s(error, failures)
            if wait_s is None or time.monotonic() - started_s + wait_s >= deadline_s:
                raise
        time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _attempt(ask: Ask, query: str, bucket: str, asked: Asked, limit_s: float) -> Page:
    """Ask once; a server that drips its answer is cut off at the limit."""
    interrupt = Interrupt()
    timer = threading.Timer(limit_s, interrupt.fire)
    timer.name, timer.daemon = "weightstream-limit", True
    timer.start()
    try:
        answer = ask(query, interrupt)
        if not answer.ok:
            raise refusal(answer, asked, time.time())
        return parse_page(answer.body, bucket, asked)
    except OriginError as error:
        if not interrupt.fired:
            raise
        cause = "no whole answer to a listing within the deadline"
        raise UnavailableError(asked.says(cause)) from error
    finally:
        timer.cancel()


def _delay_s(error: OriginError, failures: int) -> float | None:
    """Return how long to wait before the next attempt; None to give up."""
    if not error.transient or failures == MAX_ATTEMPTS:
        return None
    wanted_s = error.retry_after_s if isinstance(error, ThrottledError) else None
    if wanted_s is not None and wanted_s > LONGEST_WAIT_S:
        return None
    return max(wanted_s or 0.0, 0.1 * 3.0 ** (failures - 1) * (0.5 + random() / 2))


def page_query(prefix: str, token: str) -> str:
    """Return the query string of one page: names escaped, as XML cannot hold them all."""
    words = {"list-type": "2", "delimiter": "/", "encoding-type": "url", "prefix": prefix}
    if token:
        words["continuation-token"] = token
    return "&".join(
        f"{name}={quote(text, safe='', errors='surrogateescape')}"
        for name, text in sorted(words.items())
    )


def parse_page(body: bytes, bucket: str, asked: Asked) -> Page:
    """Read one answer to ListObjectsV2."""
    if b"<!DOCTYPE" in body or b"<!ENTITY" in body:
        raise ProtocolError(asked.says("the listing declares entities"))
    try:
        root = ElementTree.fromstring(body)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ProtocolError(asked.says(f"the listing is not XML: {error}")) from error
    space, _, name = root.tag.rpartition("}")
    if name != "ListBucketResult":
        raise ProtocolError(asked.says(f"answered <{name[:40]}> where a listing was asked for"))
    space = f"{space}}}" if space else ""
    escaped = root.findtext(f"{space}EncodingType") == "url"
    try:
        return _page_of(root, space, _unescape if escaped else str, bucket)
    except (ValueError, TypeError) as error:
        raise ProtocolError(asked.says(f"an entry of the listing is not valid: {error}")) from error


def _page_of(
    root: ElementTree.Element, space: str, name_of: Callable[[str], str], bucket: str
) -> Page:
    key, size, etag, modified = (space + n for n in ("Key", "Size", "ETag", "LastModified"))
    files = [
        Listed(
            Blob(
                f"s3://{bucket}/{name_of(entry.findtext(key) or '')}",
                int(entry.findtext(size) or 0),
                plain_etag(entry.findtext(etag)),
            ),
            _modified_ns(entry.findtext(modified)),
        )
        for entry in root.iterfind(f"{space}Contents")
    ]
    prefixes = [
        name_of(found.findtext(f"{space}Prefix") or "")
        for found in root.iterfind(f"{space}CommonPrefixes")
    ]
    more = root.findtext(f"{space}IsTruncated") == "true"
    token = root.findtext(f"{space}NextContinuationToken") or "" if more else ""
    if more and not token:
        raise ValueError("it is cut off without saying where it goes on")
    return Page(tuple(prefixes), tuple(files), token)


def _unescape(text: str) -> str:
    return unquote_plus(text, errors="surrogateescape")


def _modified_ns(text: str | None) -> int | None:
    return datetime_ns(datetime.fromisoformat(text)) if text else None


def list_through_s3fs(
    fs: Any, bucket: str, key: str, asked: Asked, deadline_s: float
) -> FolderListing:
    """List the same through s3fs; a thousand entries may take `deadline_s`."""
    from fsspec.asyn import sync

    prefix = f"{key}/" if key else ""
    page = sync(fs.loop, _collect, fs, bucket, prefix, deadline_s)
    assert isinstance(page, Page)
    return _listing(iter((page,)), prefix, asked)


async def _collect(fs: Any, bucket: str, prefix: str, limit_s: float) -> Page:
    folders: list[str] = []
    files: list[Listed] = []
    clock = asyncio.get_running_loop().time
    async with asyncio.timeout(limit_s) as limit:
        await fs.set_session()
        async for info in fs._iterdir(bucket, prefix=prefix, delimiter="/"):
            path = str(info["name"]).removeprefix(f"{bucket}/")
            if info["type"] == "directory":
                folders.append(f"{path}/")
            else:
                blob = Blob(f"s3://{bucket}/{path}", int(info["size"]), plain_etag(info["ETag"]))
                files.append(Listed(blob, datetime_ns(info["LastModified"])))
            count = len(folders) + len(files)
            if count % _S3FS_STEP == 0 and count <= MAX_ENTRIES:
                limit.reschedule(clock() + limit_s)
    return Page(tuple(folders), tuple(files), "")
