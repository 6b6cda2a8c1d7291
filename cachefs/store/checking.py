"""Hashing what is on the disk, by as many threads as help."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from blake3 import blake3

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.store.files import OpenFile, read_fully

# Read and hash in steps that stay in the second-level cache; both release the interpreter's lock.
_STEP_BYTES = 1 << 20
# One core hashes 6.9 GB/s, more than most disks read: beyond a few threads nothing is gained.
_MAX_THREADS = 4
# Chunks handed to the threads at once, so that 100,000 chunks do not become 100,000 objects.
_BATCH = 128


def hash_bytes(data: memoryview) -> bytes:
    """Return the BLAKE3 of `data`."""
    return blake3(data).digest()


def hash_extent(file: OpenFile, extent: Extent) -> bytes | None:
    """Return the BLAKE3 of a part of a file; None when it cannot be read to its end."""
    hasher = blake3()
    buffer = memoryview(bytearray(min(_STEP_BYTES, len(extent))))
    for start in range(extent.start, extent.stop, _STEP_BYTES):
        step = buffer[: min(_STEP_BYTES, extent.stop - start)]
        try:
            if not read_fully(file.fileno(), step, start):
                return None
        except OSError:  # a bad sector: as wrong as a wrong byte
            return None
        hasher.update(step)
    return hasher.digest()


def check_many(check: Callable[[int], bool], chunks: Sequence[int]) -> Iterator[bool]:
    """Yield the result of `check` for each chunk in order, computed by several threads."""
    if len(chunks) < 2:
        yield from map(check, chunks)
        return
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(chunks))
    remaining = iter(chunks)
    with ThreadPoolExecutor(threads, "weightstream-verify") as pool:
        while batch := list(islice(remaining, _BATCH)):
            yield from pool.map(check, batch)
