"""Stored listings: what the origin said a model consists of, for warm and for offline loads.

Each is one small JSON file, replaced whole. Anything that is not exactly what this module writes is
treated as absent: the origin is asked again.
"""

import json
import logging
import time
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store.files import DIRECTORY_MODE, replace_file, store_errors
from weightstream.cachefs.store.layout import Layout

_FORMAT = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredListing:
    """The files under `uri` as listed at `fetched_at_s` (wall clock, seconds)."""

    uri: str
    fetched_at_s: float
    blobs: tuple[Blob, ...]


def save_listing(layout: Layout, uri: str, blobs: tuple[Blob, ...]) -> None:
    """Keep a listing, replacing an older one."""
    rows = [[blob.uri, blob.size, blob.version] for blob in blobs]
    content = {"format": _FORMAT, "uri": uri, "fetched_at_s": time.time(), "blobs": rows}
    path = layout.listing(uri)
    with store_errors(f"save the listing of {uri} in {path}"):
        path.parent.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
        replace_file(path, json.dumps(content).encode())


def load_listing(layout: Layout, uri: str) -> StoredListing | None:
    """Return the stored listing of `uri`, if there is one that makes sense."""
    path = layout.listing(uri)
    try:
        listing = _parse(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        _log.debug("ignoring the stored listing %s: %r", path, error)
        return None
    return listing if listing.uri == uri else None


def _parse(content: object) -> StoredListing:
    if not isinstance(content, dict) or content["format"] != _FORMAT:
        raise ValueError("not a listing of this format")
    uri, fetched_at_s = content["uri"], content["fetched_at_s"]
    if not isinstance(uri, str) or not isinstance(fetched_at_s, float):
        raise ValueError("wrong types")
    return StoredListing(uri, fetched_at_s, tuple(_blob(*row) for row in content["blobs"]))


def _blob(uri: object, size: object, version: object) -> Blob:
    if not (isinstance(uri, str) and isinstance(version, str) and type(size) is int and size >= 0):
        raise ValueError("wrong types in a row")
    return Blob(uri, size, version)
