"""Take the chunks that the store has already, in another model, instead of fetching them.

Fine-tunes of one base share most of their files' bytes, and the manifest tells which: chunks of the
same hash and length are the same bytes. Each is hashed as it is copied. The manifest's word is the
origin's at best, so when a file is complete its checksum at the origin is asked for as well.
"""

import logging
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from awscrt import checksums

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch.checks import check_stored
from weightstream.cachefs.fetch.memory import allocate
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.cachefs.origin.base import StorageOptions
from weightstream.cachefs.store import ChunkState, Store, StoredBlob
from weightstream.cachefs.store.checking import hash_bytes
from weightstream.errors import (
    FormatError,
    IntegrityError,
    OriginError,
    StoreError,
    WeightstreamError,
)
from weightstream.p2p.manifest.fetching import find_manifest
from weightstream.p2p.manifest.known import check_key, manifest_key
from weightstream.p2p.manifest.manifest import Manifest
from weightstream.p2p.manifest.paths import is_ours
from weightstream.p2p.manifest.same import SameChunk, same_chunks
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_THREADS = 3  # one reads, one hashes, one writes: more only queue at the disk


def reuse(blob: Blob, store: Store, manifest: Manifest) -> int:
    """Copy into `blob` what other blobs have of it; return the bytes."""
    same = same_chunks([blob], store, manifest).get(blob, ())
    return sum(one.length for one in copy_chunks(blob, same, store, manifest.chunk_size))


def copy_chunks(
    blob: Blob, same: Sequence[SameChunk], store: Store, chunk_size: int
) -> tuple[SameChunk, ...]:
    """Copy chunks within the store, each hashed on the way; return those that were copied.

    The others are left to be fetched: their source was wrong or went, somebody fetches them, the
    disk is full.
    """
    with ExitStack() as opened:
        sources = _open_sources(same, store, opened)  # open blobs are not evicted
        usable = [one for one in same if one.source in sources]
        if not usable or not _has_room(store, sum(one.length for one in usable)):
            return ()
        target = opened.enter_context(store.open_blob(blob))
        if target.chunk_size != chunk_size:
            return ()
        copier = _Copier(target, sources, chunk_size)
        with ThreadPoolExecutor(_THREADS, "weightstream-reuse") as pool:
            results = list(pool.map(copier.copy, usable))
        target.sync()
    return tuple(one for one, copied in zip(usable, results, strict=True) if copied)


def _open_sources(
    same: Sequence[SameChunk], store: Store, opened: ExitStack
) -> dict[Blob, StoredBlob]:
    sources = {}
    for source in {one.source for one in same}:
        stored = store.find_blob(source)
        if stored is not None:
            sources[source] = opened.enter_context(stored)
    return sources


def _has_room(store: Store, needed: int) -> bool:
    if store.room_bytes() < needed:
        store.evict(needed)  # the fetch would have had to
    return store.room_bytes() >= needed


class _Copier:
    """Copies chunks into one blob, on several threads."""

    def __init__(
        self, target: StoredBlob, sources: Mapping[Blob, StoredBlob], chunk_size: int
    ) -> None:
        self._target = target
        self._sources = sources
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(_THREADS):
            self._buffers.put(memoryview(allocate(chunk_size)))

    def copy(self, same: SameChunk) -> bool:
        """Copy one chunk; False when it is to be fetched after all."""
        buffer = self._buffers.get()
        try:
            return self._copy(same, buffer[: same.length])
        except StoreError as error:
            log.warning("%s chunk %d is not reused: %s", self._target.blob.uri, same.chunk, error)
            return False
        finally:
            self._buffers.put(buffer)

    def _copy(self, same: SameChunk, view: memoryview) -> bool:
        source = self._sources[same.source]
        if not source.read_into(same.source_chunk, 0, view):
            return False
        if hash_bytes(view) != same.digest:
            log.warning("%s %s is wrong", same.source.uri, source.chunk(same.source_chunk))
            source.drop(same.source_chunk)
            return False
        if not self._target.try_lock(same.chunk):
            return False
        try:
            if self._target.state(same.chunk) is not ChunkState.EMPTY:
                return False
            crc = checksums.crc64nvme(view)
            self._target.write(same.chunk, view, same.digest, crc)
            return True
        finally:
            self._target.unlock(same.chunk)


@dataclass(slots=True)
class Reused:
    """What was copied for one model."""

    uri: str
    chunks: dict[Blob, tuple[SameChunk, ...]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Return how much need not be fetched."""
        return sum(one.length for some in self.chunks.values() for one in some)


def reuse_model(
    uri: str,
    settings: Settings,
    store: Store,
    storage_options: StorageOptions | None = None,
) -> Reused:
    """Copy what the store has of a published model under other names; never fails for itself.

    An origin that does not answer, or has no manifest, leaves everything to the fetch.
    """
    reused = Reused(uri)
    if not store.writable or not any(info.present_bytes for info in store.blobs()):
        return reused
    origin = open_origin(uri, settings, storage_options)
    try:
        listing = [blob for blob in origin.list(uri) if not is_ours(blob.uri)]
        manifest = _manifest(origin, listing, settings)
        if manifest is not None and manifest.chunk_size == settings.chunk_size:
            for blob, same in same_chunks(listing, store, manifest).items():
                if copied := copy_chunks(blob, same, store, manifest.chunk_size):
                    reused.chunks[blob] = copied
    except (FormatError, IntegrityError, StoreError) as error:
        log.warning("nothing more is reused for %s: %s", origin.uri, error)
    except OriginError as error:
        log.debug("nothing is reused for %s: %s", origin.uri, error)
    finally:
        origin.close()
    return reused


def _manifest(origin: Origin, listing: Sequence[Blob], settings: Settings) -> Manifest | None:
    if not listing or origin.local_path(listing[0]) is not None:
        return None
    one_file = len(listing) == 1 and listing[0].uri == origin.uri
    model_uri = origin.uri.rpartition("/")[0] if one_file else origin.uri
    manifest = find_manifest(origin, model_uri, settings.deadline_s)
    if manifest is not None:
        check_key(manifest, manifest_key(settings))
    return manifest


def confirm(
    reused: Reused,
    settings: Settings,
    store: Store,
    storage_options: StorageOptions | None = None,
) -> bool:
    """Compare complete files with the origin's checksums; drop what was copied into wrong ones.

    Returns False when something was dropped: it is to be fetched, and the manifest lied.
    """
    if not reused.chunks:
        return True
    good = True
    origin = open_origin(reused.uri, settings, storage_options)
    try:
        for blob, copied in reused.chunks.items():
            good &= _confirm(origin, blob, copied, store)
    finally:
        origin.close()
    return good


def _confirm(origin: Origin, blob: Blob, copied: Sequence[SameChunk], store: Store) -> bool:
    stored = store.find_blob(blob)
    if stored is None:
        return True
    with stored:
        if not stored.complete:
            return True
        try:
            wrong: WeightstreamError | None = check_stored(origin, stored)
        except OriginError as error:
            log.debug("%s is not compared with its origin: %s", blob.uri, error)
            return True
        if wrong is None:
            return True
        log.warning("the manifest of %s lies: %s", blob.uri, wrong)
        for one in copied:
            stored.drop(one.chunk)
        return False
