"""Opening and creating a blob's two files, safely against everybody else doing the same.

A blob is in use while its table's IN_USE byte is locked shared; whoever unlinks a blob first takes
that byte exclusively. An opener may still get hold of a table just before it is unlinked, so it
looks, with the lock taken, whether the name still leads to that table, and starts over when not.

Names are made and removed under the blob's byte in STORE/lock. A new table is written under another
name and renamed, so what is under its name is whole, unless a power loss came before the first
sync(): then it does not parse and is rebuilt, which loses nothing that was DURABLE.
"""

import errno
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store.files import DIRECTORY_MODE, OpenFile, store_errors, write_fully
from weightstream.cachefs.store.layout import Layout, lock_byte
from weightstream.cachefs.store.locks import LockFile
from weightstream.cachefs.store.stats import Counters
from weightstream.cachefs.store.table import DamagedTable, Header, Table
from weightstream.errors import StoreError, StoreReadOnlyError

# Lock bytes on a table, far beyond its end: one per chunk from CHUNK_LOCKS on.
CHUNK_LOCKS = 1 << 40
IN_USE = 1 << 41
CHANGE = IN_USE + 1

# Holders of these locks do a few system calls; one that takes this long is stopped or stuck.
LOCK_TIMEOUT_S = 30.0

# What an off_t holds, less room for rounding up to whole chunks.
_MAX_BYTES = (1 << 63) - (1 << 32)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlobFiles:
    """An open blob: whoever references this keeps it open and in use."""

    table: Table
    data: OpenFile
    locks: LockFile
    writable: bool


def open_files(layout: Layout, blob_id: str, writable: bool) -> BlobFiles | None:
    """Open a blob, read-only where need be; None when it is not there.

    Raises `DamagedTable` when it is there but cannot be believed.
    """
    path = layout.table(blob_id)
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with store_errors(f"open {path}"):
            try:
                files = _try_open(layout, blob_id, writable)
            except FileNotFoundError:
                return None
            except PermissionError:
                if not writable:
                    raise
                return open_files(layout, blob_id, writable=False)
        if files is not None:
            return files
        time.sleep(0.001)
    raise StoreError(f"cannot open {path}: it is being removed for over {LOCK_TIMEOUT_S:g} s")


def _try_open(layout: Layout, blob_id: str, writable: bool) -> BlobFiles | None:
    """Open once; None when the blob was being removed at that moment."""
    path = layout.table(blob_id)
    flags = os.O_RDWR if writable else os.O_RDONLY
    locks = LockFile(path, writable)
    if not locks.try_lock(IN_USE, shared=True):
        return None
    # A description of its own: a mapping keeps a duplicate of its descriptor, see locks.py.
    file = OpenFile(path, flags)
    mine, named = os.fstat(locks.file().fileno()), os.fstat(file.fileno())
    if mine.st_ino != named.st_ino:
        return None
    table = Table(file, shared=writable)
    return BlobFiles(table, _open_data(layout.data(blob_id), flags), locks, writable)


def _open_data(path: Path, flags: int) -> OpenFile:
    try:
        return OpenFile(path, flags)
    except FileNotFoundError as error:
        raise DamagedTable(f"{path} is missing") from error


def find_files(layout: Layout, blob: Blob, writable: bool) -> BlobFiles | None:
    """Open the files of `blob` if they are there and the table says that they are of this blob."""
    files = open_files(layout, blob.id, writable)
    if files is not None and files.table.header.blob != blob:
        raise DamagedTable(f"the table of {blob.uri} is of {files.table.header.blob.uri}")
    return files


def open_or_create(
    layout: Layout, names: LockFile, header: Header, counters: Counters
) -> BlobFiles:
    """Open the blob of `header`, making it when it is missing and anew when it is damaged."""
    blob = header.blob
    try:
        files = find_files(layout, blob, writable=True)
    except DamagedTable:
        files = None  # looked at again below, when nobody else can be about to repair it
    if files is not None:
        return _writable(files)
    with names.hold(lock_byte(blob.id), LOCK_TIMEOUT_S):
        try:
            files = find_files(layout, blob, writable=True)
        except DamagedTable as error:
            _log.warning("starting %s over in the store: %s", blob.uri, error)
            counters.add(rebuilt_tables=1)
        if files is None:
            with store_errors(f"make {layout.table(blob.id)}"):
                _create(layout, header)
            files = find_files(layout, blob, writable=True)
    if files is None:
        raise StoreError(f"cannot open {layout.table(blob.id)}: it vanished")
    return _writable(files)


def _writable(files: BlobFiles) -> BlobFiles:
    if not files.writable:
        raise StoreReadOnlyError(f"cannot write {files.data.path}: no permission")
    return files


def _create(layout: Layout, header: Header) -> None:
    """Make an empty blob, under its byte of STORE/lock; whatever has its names goes away."""
    blob = header.blob
    table, data = layout.table(blob.id), layout.data(blob.id)
    if blob.size > _MAX_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    for directory in (layout.blobs, table.parent):
        directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    unlink_files(layout, blob.id)
    temporary = table.with_suffix(".table.tmp")
    try:
        file = OpenFile(data, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.ftruncate(file.fileno(), blob.size)
        file = OpenFile(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        _allocate(file, header.table_bytes)
        write_fully(file.fileno(), memoryview(header.encode()), 0)
        temporary.rename(table)
    except OSError:
        data.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)
        raise


def _allocate(file: OpenFile, size: int) -> None:
    """Take the table's space now: a full disk met through a mapping would be a SIGBUS."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        write_fully(file.fileno(), memoryview(bytes(size)), 0)


def unlink_files(layout: Layout, blob_id: str) -> None:
    """Take a blob's names away, the table's first: data without a table is nobody's."""
    layout.table(blob_id).unlink(missing_ok=True)
    layout.data(blob_id).unlink(missing_ok=True)


def remove_files(layout: Layout, names: LockFile, blob_id: str) -> bool:
    """Remove a blob unless somebody has it open; what is mapped stays valid until unmapped."""
    with names.hold(lock_byte(blob_id), LOCK_TIMEOUT_S), store_errors(f"remove blob {blob_id}"):
        try:
            locks = LockFile(layout.table(blob_id))
        except FileNotFoundError:
            return False
        if not locks.try_lock(IN_USE):
            return False
        unlink_files(layout, blob_id)
        return True


def remove_orphan(layout: Layout, names: LockFile, blob_id: str) -> bool:
    """Remove a data file, unless a table for it appeared meanwhile."""
    with names.hold(lock_byte(blob_id), LOCK_TIMEOUT_S), store_errors(f"remove blob {blob_id}"):
        if layout.table(blob_id).exists():
            return False
        layout.data(blob_id).unlink(missing_ok=True)
        return True
