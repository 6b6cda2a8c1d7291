"""What a stored blob looks like from outside: for status, eviction and pinning."""

import os
from dataclasses import dataclass
from pathlib import Path

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store.files import OpenFile, store_errors
from weightstream.cachefs.store.layout import Layout
from weightstream.cachefs.store.locks import LockFile
from weightstream.cachefs.store.opening import IN_USE
from weightstream.cachefs.store.state import ChunkState, count_present, present_bytes
from weightstream.cachefs.store.table import Stamp, Table

_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's block size


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """A snapshot of one stored blob."""

    blob: Blob
    chunk_size: int
    n_chunks: int
    present_bytes: int
    durable_chunks: int
    allocated_bytes: int
    last_used_s: float
    pinned: bool
    in_use: bool
    complete: bool


def inspect(layout: Layout, blob_id: str) -> BlobInfo | None:
    """Look at a blob without opening it for use; None when it is not there any more.

    Raises `DamagedTable` when its table cannot be believed.
    """
    path = layout.table(blob_id)
    with store_errors(f"look at {path}"):
        try:
            file = OpenFile(path, os.O_RDONLY)
            data = OpenFile(layout.data(blob_id), os.O_RDONLY)
            in_use = LockFile(path, writable=False).taken_elsewhere(IN_USE)
        except FileNotFoundError:
            return None
        return _describe(Table(file, shared=False), file, data, in_use)


def _describe(table: Table, file: OpenFile, data: OpenFile, in_use: bool) -> BlobInfo:
    header, states = table.header, table.states()
    all_present = count_present(states) == header.n_chunks
    return BlobInfo(
        blob=header.blob,
        chunk_size=header.chunk_size,
        n_chunks=header.n_chunks,
        present_bytes=present_bytes(states, header.chunk_size, header.blob.size),
        durable_chunks=states.count(ChunkState.DURABLE),
        allocated_bytes=allocated_bytes(file) + allocated_bytes(data),
        last_used_s=table.last_used_ns / 1e9,
        pinned=table.pinned,
        in_use=in_use,
        complete=all_present and table.seal == Stamp.of(data),
    )


def allocated_bytes(file: OpenFile | Path) -> int:
    """Return the space that a file takes on the disk."""
    status = os.stat(file) if isinstance(file, Path) else os.fstat(file.fileno())
    return status.st_blocks * _BLOCK_BYTES


def is_under(uri: str, prefix: str) -> bool:
    """Say whether `uri` is `prefix` or lies below it; every URI lies below the empty prefix."""
    prefix = prefix.rstrip("/")
    return not prefix or uri == prefix or uri.startswith(f"{prefix}/")
