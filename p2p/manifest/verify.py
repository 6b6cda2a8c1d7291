"""`verify`: compare a model, or what the local store has of it, with what was published.

The bytes decide: a file that was uploaded again, byte for byte, has another version and is right.
It is named all the same, for nobody takes a published hash for another version than its own.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Progress
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.cachefs.origin.base import StorageOptions
from weightstream.cachefs.origin.urls import shown
from weightstream.cachefs.store import Store
from weightstream.errors import IntegrityError
from weightstream.p2p.manifest.fetching import fetch_manifest
from weightstream.p2p.manifest.listing import list_published
from weightstream.p2p.manifest.manifest import Manifest, ManifestFile
from weightstream.p2p.manifest.paths import manifest_uri
from weightstream.p2p.manifest.reading import (
    ProgressCallback,
    landings_for,
    read_all,
    reading_settings,
)
from weightstream.p2p.manifest.signing import check_signature
from weightstream.p2p.manifest.stored import hash_held, held_files
from weightstream.settings import Settings


@dataclass(frozen=True, slots=True)
class WrongChunk:
    """Bytes that are not those that were published."""

    path: str
    chunk: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found."""

    uri: str
    manifest: str
    root: str
    """The root hash, in hex."""
    signed_by: str | None
    """The key that the signature was checked with, where one was given."""
    ok: bool
    files: int
    bytes_checked: int
    bytes_absent: int
    """What the local store does not have; 0 when the origin was read."""
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    resized: tuple[str, ...]
    restamped: tuple[str, ...]
    """Files of another version than was published, with the same size."""
    wrong: tuple[WrongChunk, ...]
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class _Found:
    """What the two ways of checking come to."""

    bytes_checked: int
    wrong: tuple[WrongChunk, ...]
    bytes_absent: int = 0
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    restamped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not (self.wrong or self.missing or self.extra or self.resized)


def verify(
    uri: str,
    settings: Settings,
    manifest: str | None = None,
    key: Path | None = None,
    local: bool = False,
    progress: ProgressCallback | None = None,
    storage_options: StorageOptions | None = None,
) -> VerifyReport:
    """Compare the model at `uri` with its manifest: the one beside it, or at the URL `manifest`.

    Every byte is read: from the origin, or with `local` what the store has, asking the origin for
    the manifest alone. `key` is the public key that must have signed it. What is wrong with the
    model is in the report; a manifest that is wrong raises `FormatError` or `IntegrityError`.
    """
    began_s = time.monotonic()
    origin = open_origin(uri, settings, storage_options)
    try:
        published = _manifest(origin, settings, manifest)
        where = shown(manifest or manifest_uri(origin.uri))
        if key is not None:
            check_signature(published, key, where)
        if local:
            found = _check_store(published, settings, progress)
        else:
            found = _check_origin(uri, origin, published, settings, progress)
    finally:
        origin.close()
    return VerifyReport(
        uri=shown(uri),
        manifest=where,
        root=published.root.hex(),
        signed_by=str(key) if key is not None else None,
        ok=found.ok,
        files=len(published.files),
        bytes_checked=found.bytes_checked,
        bytes_absent=found.bytes_absent,
        missing=found.missing,
        extra=found.extra,
        resized=found.resized,
        restamped=found.restamped,
        wrong=found.wrong,
        elapsed_s=time.monotonic() - began_s,
    )


def _manifest(origin: Origin, settings: Settings, where: str | None) -> Manifest:
    if where is None:
        return fetch_manifest(origin, origin.uri, settings.deadline_s)
    other = open_origin(where, settings)
    try:
        return fetch_manifest(other, origin.uri, settings.deadline_s, other.uri)
    finally:
        other.close()


def _check_origin(
    uri: str,
    origin: Origin,
    manifest: Manifest,
    settings: Settings,
    progress: ProgressCallback | None,
) -> _Found:
    listed = list_published(origin, uri, manifest)
    pairs = [(file, listed.get(file.path)) for file in manifest.files]
    there = [(file, blob) for file, blob in pairs if blob is not None]
    same_size = [(file, blob) for file, blob in there if blob.size == file.size]
    hashes = _hash([blob for _, blob in same_size], origin, manifest, settings, progress)
    wrong = tuple(
        bad for file, blob in same_size for bad in _compare(manifest, file, hashes.digests(blob))
    )
    if hashes.damage is not None and not wrong:
        raise hashes.damage
    return _Found(
        bytes_checked=sum(blob.size for _, blob in same_size),
        wrong=wrong,
        missing=tuple(file.path for file, blob in pairs if blob is None),
        extra=tuple(path for path in listed if manifest.file(path) is None),
        resized=tuple(file.path for file, blob in there if blob.size != file.size),
        restamped=tuple(file.path for file, blob in same_size if blob.version != file.version),
    )


@dataclass(frozen=True, slots=True)
class _Hashes:
    digests: Callable[[Blob], bytes]
    damage: IntegrityError | None
    """What arrived has not the origin's own checksum."""


def _hash(
    blobs: list[Blob],
    origin: Origin,
    manifest: Manifest,
    settings: Settings,
    progress: ProgressCallback | None,
) -> _Hashes:
    engine_settings = reading_settings(settings, manifest.chunk_size)
    landings = landings_for(blobs, engine_settings, torrent=False)
    damage: IntegrityError | None = None
    try:
        read_all(landings, origin, None, engine_settings, progress)
    except IntegrityError as error:  # raised when everything has landed: say which chunks
        damage = error
    return _Hashes(lambda blob: landings[blob].digests, damage)


def _compare(manifest: Manifest, file: ManifestFile, digests: bytes) -> Iterator[WrongChunk]:
    if digests == file.digests:
        return
    for i, extent in manifest.chunks(file):
        if digests[i * 32 : i * 32 + 32] != file.digest(i):
            yield _wrong(file, i, extent)


def _wrong(file: ManifestFile, chunk: int, extent: Extent) -> WrongChunk:
    return WrongChunk(file.path, chunk, extent.start, extent.stop)


def _check_store(
    manifest: Manifest, settings: Settings, progress: ProgressCallback | None
) -> _Found:
    with Store.open(settings) as store:
        held = held_files(manifest, store)
        total = sum(len(extent) for one in held for _, extent in one.chunks)
        done = 0
        wrong: list[WrongChunk] = []
        with ThreadPoolExecutor(2, "weightstream-verify") as pool:
            for one in held:
                for i, extent, digest in hash_held(one, store, pool):
                    done += len(extent)
                    if digest != one.file.digest(i):
                        wrong.append(_wrong(one.file, i, extent))
                    if progress is not None:
                        progress(Progress(done, total, {"store": done}))
    return _Found(done, tuple(wrong), bytes_absent=manifest.size - done)
