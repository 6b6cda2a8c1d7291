"""Where a published model keeps what was published, and how its files are named there."""

from collections.abc import Iterable
from urllib.parse import unquote

from weightstream.cachefs.blob import Blob
from weightstream.errors import UsageError

FOLDER = ".weightstream"
MANIFEST_NAME = "manifest.json"
TORRENT_NAME = "model.torrent"

_WEB = ("http://", "https://")


def manifest_uri(model_uri: str) -> str:
    """Return where the manifest of a model lies when it lies beside the model."""
    return f"{model_uri.rstrip('/')}/{FOLDER}/{MANIFEST_NAME}"


def is_ours(path: str) -> bool:
    """Say whether a path is of what weightstream itself keeps beside a model, at any depth."""
    return FOLDER in path.split("/")


def file_path(model_uri: str, uri: str) -> str | None:
    """Return the path of a file below its model; None when it does not lie there.

    Compared without the scheme and the slashes around it: fsspec writes `memory:///a`, `s3a://`.
    """
    root, name = _plain(model_uri), _plain(uri)
    if not root or not name.startswith(f"{root}/"):
        return None
    path = name[len(root) + 1 :]
    return unquote(path) if uri.startswith(_WEB) else path


def folder_name(model_uri: str) -> str:
    """Return the name of a model's folder, not percent-encoded."""
    name = model_uri.rstrip("/").rsplit("/", 1)[-1]
    return unquote(name) if model_uri.startswith(_WEB) else name


def files_of(model_uri: str, listing: Iterable[Blob]) -> dict[str, Blob]:
    """Return the model's files by path, without what weightstream keeps there."""
    found: dict[str, Blob] = {}
    for blob in listing:
        path = file_path(model_uri, blob.uri)
        if path is None:
            raise UsageError(f"{model_uri}: not the URI of a model's folder: it holds {blob.uri}")
        if not is_ours(path):
            found[path] = blob
    return dict(sorted(found.items()))


def _plain(uri: str) -> str:
    return uri.partition("://")[2].strip("/") if "://" in uri else uri.strip("/")
