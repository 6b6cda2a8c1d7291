"""Where models live: any fsspec URL, listed through fsspec and read over connections of our own."""

import os

from weightstream.cachefs.origin.base import (
    Checksum,
    FolderListing,
    Listed,
    Listing,
    Origin,
    StorageOptions,
)
from weightstream.errors import UsageError
from weightstream.settings import Settings

__all__ = ["Checksum", "FolderListing", "Listed", "Listing", "Origin", "open_origin"]


def open_origin(
    uri: str | os.PathLike[str],
    settings: Settings,
    storage_options: StorageOptions | None = None,
) -> Origin:
    """Return the origin that a URI or path names. Contacts nothing, imports no SDK."""
    text = os.fspath(uri)
    if not text or "\0" in text:
        raise UsageError(f"{text!r}: not a URI or path")
    options = storage_options or {}
    scheme = text.partition("://")[0].lower() if "://" in text else "file"
    match scheme:
        case "file" | "local":
            from weightstream.cachefs.origin.local import LocalOrigin

            return LocalOrigin(text)
        case "s3" | "s3a":
            from weightstream.cachefs.origin.s3 import S3Origin

            return S3Origin(text, settings, options)
        case "http" | "https":
            from weightstream.cachefs.origin.web import WebOrigin

            return WebOrigin(text, settings, options)
        case "hf":
            from weightstream.cachefs.origin.hub import HubOrigin

            return HubOrigin(text, settings, options)
        case "gs" | "gcs":
            from weightstream.cachefs.origin.gcs import GcsOrigin

            return GcsOrigin(text, settings, options)
    from weightstream.cachefs.origin.generic import GenericOrigin

    return GenericOrigin(text, settings, options)
