"""Asks an origin for one folder, and says once what of it a mount cannot show."""

import threading

from weightstream.cachefs.files.entries import Entry
from weightstream.cachefs.files.names import Hidden, name_in_uri, sift, some, uri_of
from weightstream.cachefs.origin import FolderListing, Listed, Origin
from weightstream.cachefs.origin.urls import shown
from weightstream.errors import NotFoundError
from weightstream.log import get_logger

MAX_WARNED_FOLDERS = 100

log = get_logger(__name__)


class Lister:
    """The folders under one root. Thread-safe."""

    def __init__(self, uri: str, origin: Origin) -> None:
        self.is_web = uri.startswith(("http://", "https://"))
        self.root = _without_slash(shown(uri) if self.is_web else uri)
        self._origin = origin
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def uri(self, path: str) -> str:
        """Return the URI of a path under the root."""
        return uri_of(self.root, path, web=self.is_web)

    def list(self, path: str) -> tuple[Entry, ...]:
        """Return what is in a folder now, sorted by name; raises what the origin says."""
        try:
            listing = self._origin.list_folder(self.uri(path))
        except NotFoundError:
            if path:
                raise
            listing = self._single()
        sifted = sift(path, listing, web=self.is_web)
        if sifted.hidden:
            self._warn(path, sifted.hidden)
        return sifted.entries

    def _single(self) -> FolderListing:
        """Return the listing of a root that is one file; raise where it is not."""
        blobs = self._origin.list(self.root)
        names = {name_in_uri(blob.uri, web=self.is_web) for blob in blobs}
        if len(blobs) != 1 or names != {name_in_uri(self.root, web=self.is_web)}:
            raise NotFoundError(f"{self.root}: not a folder")
        return FolderListing((), (Listed(blobs[0], None),))

    def _warn(self, path: str, hidden: tuple[Hidden, ...]) -> None:
        with self._lock:
            if path in self._warned or len(self._warned) >= MAX_WARNED_FOLDERS:
                return
            self._warned.add(path)
        log.warning(
            "%s: names that no file can have are left out: %s", self.uri(path), some(hidden)
        )


def _without_slash(uri: str) -> str:
    """Return a URI without its trailing slash; `file:///` keeps what is its path."""
    bare = uri.rstrip("/")
    return uri if bare.endswith(":") or not bare else bare
