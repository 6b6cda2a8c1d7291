"""Small blobs with known content, and the usual ways to put them into a store and look at them."""

import mmap
import os
from pathlib import Path

from blake3 import blake3
from tests.kit.models import random_bytes

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.settings import Settings

CHUNK = 64 << 10


def open_store(root: Path, **overrides: object) -> Store:
    """Open the store below `root`, as a process of its own would."""
    values: dict[str, object] = {
        "store": root / "store",
        "chunk_size": CHUNK,
        "store_min_free_bytes": 0,
    }
    return Store.open(Settings.model_validate(values | overrides))


def make_blob(chunks: int = 4, tail: int = 777, name: str = "a", version: str = "v1") -> Blob:
    """Return a blob of full chunks and a tail."""
    return Blob(f"s3://bucket/model/{name}", chunks * CHUNK + tail, version)


def content_of(blob: Blob) -> bytes:
    """Return the bytes that the origin has for this blob."""
    return random_bytes(blob.size, blob.id)


def piece_of(stored: StoredBlob, i: int) -> bytes:
    """Return the right bytes of one chunk."""
    extent = stored.chunk(i)
    return random_bytes(len(extent), stored.blob.id, extent.start)


def put(stored: StoredBlob, *chunks: int) -> None:
    """Write chunks from aligned memory, as the engine does."""
    memory = mmap.mmap(-1, stored.chunk_size)
    for i in chunks:
        data = piece_of(stored, i)
        view = memoryview(memory)[: len(data)]
        view[:] = data
        stored.write(i, view, blake3(data).digest(), i)


def fill(stored: StoredBlob) -> None:
    """Write and seal the whole blob."""
    put(stored, *range(stored.n_chunks))
    stored.sync()


def store_blob(root: Path, blob: Blob) -> Path:
    """Keep a whole blob, close everything, and return where its bytes lie."""
    with open_store(root) as store, store.open_blob(blob) as stored:
        fill(stored)
        return stored.data_path


def read_chunk(stored: StoredBlob, i: int) -> bytes | None:
    """Read a whole chunk through the store."""
    buffer = bytearray(len(stored.chunk(i)))
    return bytes(buffer) if stored.read_into(i, 0, memoryview(buffer)) else None


def table_of(data: Path) -> Path:
    """Return the path of the table beside a data file."""
    return data.with_suffix(".table")


def flip(path: Path, at: int, mask: int = 0x10, touch: bool = True) -> None:
    """Change bits of one byte, as a bad disk would (`touch` False) or as a program would."""
    status = path.stat()
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))
    if touch:  # a coarse clock could give the write the time of the seal
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    else:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
