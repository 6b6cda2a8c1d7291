"""Map what lies on this machine already: files, and blobs that are complete in the store.

Mapped privately, copy on write: every process of the node shares the page cache's copy, and what a
caller writes into its tensors stays its own.
"""

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store.files import read_ahead
from weightstream.errors import FormatError, NotFoundError, ObjectChangedError, OriginError
from weightstream.loader.session import Session

if TYPE_CHECKING:
    from weightstream.cachefs.store import StoredBlob


def map_blob(session: Session, blob: Blob) -> mmap.mmap | None:
    """Return the blob's bytes in file layout; None when they have to be fetched."""
    if session.is_local:
        return map_file(Path(blob.uri.removeprefix("file://")), blob)
    store = session.store
    stored = store.find_blob(blob) if store and blob.version else None
    if stored is None:
        return None
    with stored:
        if not _trusted(stored, session.settings.verify == "always"):
            return None
        stored.touch()
        return stored.map()


def _trusted(stored: "StoredBlob", always: bool) -> bool:
    """Say whether the blob may be mapped; hashes it first where its bytes are in doubt."""
    if stored.blob.size == 0 or 0 in stored.states():  # ChunkState.EMPTY
        return False
    if always or not stored.complete:
        stored.verify(everything=always)
    return stored.complete


def map_file(path: Path, blob: Blob) -> mmap.mmap:
    """Map a file that has the size its listing says."""
    if blob.size == 0:
        raise FormatError(f"{blob.uri}: 0 bytes are too few for a safetensors file")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size != blob.size:
                raise ObjectChangedError(f"{blob.uri}: {size} bytes now, {blob.size} when listed")
            read_ahead(descriptor)
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=protection)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise NotFoundError(f"{blob.uri}: no such file") from error
    except OSError as error:
        raise OriginError(f"{blob.uri}: cannot be mapped: {error.strerror}") from error
