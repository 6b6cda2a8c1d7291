"""What the local store holds of a published model, and the hashes of the bytes that it really has.

Only looked at: what is found wrong stays for whoever asked to decide about.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.cachefs.store.checking import hash_extent
from weightstream.cachefs.store.files import OpenFile, store_errors
from weightstream.cachefs.store.state import suspected
from weightstream.p2p.manifest.manifest import Manifest, ManifestFile

_BATCH = 64


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A published file of which the store has chunks."""

    file: ManifestFile
    blob: Blob
    chunks: tuple[tuple[int, Extent], ...]
    """The manifest's chunks that are there whole, whatever the size of the store's own."""


def held_files(manifest: Manifest, store: Store) -> list[HeldFile]:
    """Return what the store has of exactly the published versions, by path."""
    held = []
    for info in store.blobs():
        file = manifest.file_of(info.blob)
        stored = store.find_blob(info.blob) if file is not None else None
        if file is None or stored is None:
            continue
        with stored:
            there = suspected(stored.states())  # what is to be verified yet is there as well
            size = stored.chunk_size
        chunks = tuple(
            (i, extent)
            for i, extent in manifest.chunks(file)
            if all(there[extent.start // size : (extent.stop - 1) // size + 1])
        )
        held.append(HeldFile(file, info.blob, chunks))
    return sorted(held, key=lambda one: one.file.path)


def hash_held(
    held: HeldFile, store: Store, pool: Executor
) -> Iterator[tuple[int, Extent, bytes | None]]:
    """Yield number, extent and BLAKE3 of each chunk; None for one that cannot be read."""
    stored = store.find_blob(held.blob)
    if stored is None:  # evicted meanwhile
        return
    with stored:
        file = _open(stored)
        for at in range(0, len(held.chunks), _BATCH):
            batch = held.chunks[at : at + _BATCH]
            digests = pool.map(lambda chunk: hash_extent(file, chunk[1]), batch)
            for (i, extent), digest in zip(batch, digests, strict=True):
                yield i, extent, digest


def _open(stored: StoredBlob) -> OpenFile:
    with store_errors(f"open {stored.data_path}"):
        return OpenFile(stored.data_path, os.O_RDONLY)
