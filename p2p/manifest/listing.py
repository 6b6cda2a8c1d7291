"""The files of a model, as its origin lists them now."""

from urllib.parse import quote

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Origin
from weightstream.cachefs.origin.urls import shown
from weightstream.errors import NotFoundError, UsageError
from weightstream.p2p.manifest.manifest import Manifest
from weightstream.p2p.manifest.paths import files_of


def list_model(origin: Origin, asked: str) -> dict[str, Blob]:
    """Return the files under the URI `asked` by path; without what weightstream keeps there."""
    listing = origin.list(asked)
    if len(listing) == 1 and listing[0].uri == origin.uri:
        raise UsageError(f"{shown(asked)} is one file; the folder of a model is wanted")
    files = files_of(origin.uri, listing)
    if not files:
        raise NotFoundError(f"{shown(asked)}: no file is there")
    return files


def list_published(origin: Origin, asked: str, manifest: Manifest) -> dict[str, Blob]:
    """Return the files under `asked` by path; those that only the manifest knows of included.

    HTTP has no listing: what is no usual file of a model is found by its name.
    """
    files = list_model(origin, asked)
    if origin.uri.startswith(("http://", "https://")):
        for file in manifest.files:
            if file.path not in files and (blob := _ask_for(origin, file.path)) is not None:
                files[file.path] = blob
    return files


def _ask_for(origin: Origin, path: str) -> Blob | None:
    uri = f"{origin.uri}/{quote(path)}"
    try:
        (blob,) = origin.list(uri)
    except (NotFoundError, ValueError):  # nothing, or a folder of several files
        return None
    return blob if blob.uri == uri else None
