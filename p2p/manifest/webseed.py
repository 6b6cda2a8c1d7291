"""Where BitTorrent clients may read a model from its origin: only what anybody may read.

A torrent is passed on to whoever asks, so no URL in it may carry an authorization, and a URL that
needs one would be of no use. Whether a file can be read without is found out by asking for it.
"""

import logging
from typing import Protocol, runtime_checkable
from urllib.parse import quote, urlsplit

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Origin
from weightstream.cachefs.origin.connections import Pool
from weightstream.cachefs.origin.http import Client, Request
from weightstream.cachefs.origin.responses import Asked, content_length
from weightstream.cachefs.origin.tls import make_context
from weightstream.cachefs.origin.urls import Url
from weightstream.errors import WeightstreamError
from weightstream.settings import Settings

log = logging.getLogger(__name__)


@runtime_checkable
class _HasUrls(Protocol):
    def plain_url(self, blob: Blob) -> str:
        """Return the file's URL without any authorization."""
        ...


def web_seed(origin: Origin, name: str, path: str, blob: Blob, settings: Settings) -> str | None:
    """Return the URL of the folder that holds `name`, the model's folder; None without one.

    `path` and `blob` are one file of the model, by which it is found out. Where that file is all
    there is, `name` is its own.
    """
    url = _url(origin, blob)
    if url is None or not _is_public(url, blob, settings):
        return None
    return seed_folder(url, path if path == name else f"{name}/{path}")


def seed_folder(url: str, below: str) -> str | None:
    """Return what is before `below` in a file's URL; clients put the two together again.

    It ends with a slash, for a single file too: libtorrent appends the name in any case.
    """
    parts = urlsplit(url)
    for suffix in (f"/{quote(below)}", f"/{below}"):
        if not parts.query and url.endswith(suffix):
            return url.removesuffix(suffix) + "/"
    return None


def _url(origin: Origin, blob: Blob) -> str | None:
    if blob.uri.startswith(("http://", "https://")):
        return blob.uri  # names never carry an authorization: `WebOrigin` took it off
    try:
        return origin.plain_url(blob) if isinstance(origin, _HasUrls) else None
    except WeightstreamError as error:
        log.debug("no web seed: %s", error)
        return None


def _is_public(url: str, blob: Blob, settings: Settings) -> bool:
    """Ask for the file as a stranger would."""
    client = Client(
        Pool(settings.connect_timeout_s, settings.stall_timeout_s, tls=lambda: make_context(None))
    )
    asked = Asked(url, Url.parse(url).netloc)
    try:
        answer = client.fetch(Request(Url.parse(url), "HEAD"), asked, hops=0)
    except WeightstreamError as error:
        log.debug("no web seed: %s", error)
        return False
    finally:
        client.close()
    return answer.status == 200 and content_length(answer.headers) == blob.size
