"""Find the chunks that a model wants among those that the store has of others.

Chunks of the same hash and length are the same bytes, whatever files they are in, and wherever in
them. Looking costs a microsecond for each chunk of the store.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store import ChunkState, Store
from weightstream.errors import StoreError
from weightstream.p2p.manifest.manifest import Manifest, chunk_count


@dataclass(frozen=True, slots=True)
class SameChunk:
    """A chunk that is wanted, and where the store has its bytes."""

    chunk: int
    length: int
    digest: bytes
    source: Blob
    source_chunk: int


def same_chunks(
    blobs: Sequence[Blob], store: Store, manifest: Manifest
) -> dict[Blob, tuple[SameChunk, ...]]:
    """Return which missing chunks of these blobs the store has in others, by hash and length."""
    wanted: dict[tuple[bytes, int], list[tuple[Blob, int]]] = {}
    for blob in blobs:
        for i, length, digest in _missing(blob, store, manifest):
            wanted.setdefault((digest, length), []).append((blob, i))
    found: dict[Blob, list[SameChunk]] = {}
    for source, j, length, digest in _present(store) if wanted else ():
        for blob, i in wanted.pop((digest, length), ()):
            found.setdefault(blob, []).append(SameChunk(i, length, digest, source, j))
        if not wanted:
            break
    return {blob: tuple(same) for blob, same in found.items()}


def _missing(blob: Blob, store: Store, manifest: Manifest) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, length and hash of each chunk that is published and not in the store."""
    file = manifest.file_of(blob)
    if file is None:
        return
    states = bytes(chunk_count(blob.size, manifest.chunk_size))
    stored = store.find_blob(blob)
    if stored is not None:
        with stored:
            if stored.chunk_size != manifest.chunk_size:
                return
            states = stored.states()
    for i, extent in manifest.chunks(file):
        if states[i] == ChunkState.EMPTY:
            yield i, len(extent), file.digest(i)


def _present(store: Store) -> Iterator[tuple[Blob, int, int, bytes]]:
    """Yield blob, number, length and hash of every chunk of the store."""
    for info in store.blobs():
        stored = store.find_blob(info.blob) if info.present_bytes else None
        if stored is None:
            continue
        with stored:
            for i, state in enumerate(stored.states()):
                if state in (ChunkState.FILLED, ChunkState.DURABLE):
                    try:
                        digest = stored.digest(i)
                    except StoreError:  # dropped between the look and the question
                        continue
                    yield info.blob, i, len(stored.chunk(i)), digest
