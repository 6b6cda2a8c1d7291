"""How much of a model a store holds, of the version that the origin listed last."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store import BlobInfo, Store
from weightstream.cachefs.store.info import is_under


@dataclass(frozen=True, slots=True)
class Held:
    """What is there of the files under a URI."""

    uri: str
    files: int
    complete_files: int
    held_bytes: int
    total_bytes: int
    """Of the files that are known: all that the origin listed, or else those that are there."""


def held(store: Store, uris: Sequence[str]) -> list[Held]:
    """Return what the store has of each; looks at every blob once, and asks no origin."""
    infos = list(store.blobs())
    return [_held(store, uri, infos) for uri in uris]


def _held(store: Store, uri: str, infos: Iterable[BlobInfo]) -> Held:
    below = {info.blob: info for info in infos if is_under(info.blob.uri, uri)}
    listing = store.load_listing(uri.rstrip("/"))
    wanted: Iterable[Blob] = below if listing is None else listing.blobs
    here = [below[blob] for blob in wanted if blob in below]
    return Held(
        uri=uri,
        files=len(here),
        complete_files=sum(info.complete for info in here),
        held_bytes=sum(info.present_bytes for info in here),
        total_bytes=sum(blob.size for blob in wanted),
    )
