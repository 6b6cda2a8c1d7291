"""What is no longer certain of a blob when it is opened.

Two things happen behind the store's back. The machine restarts: chunks that were not DURABLE may be
anything, so they become SUSPECT. Somebody writes to a sealed data file, truncates or replaces it:
its stamp (mtime, size, inode) is not the one recorded at sealing, and every chunk becomes SUSPECT.
SUSPECT chunks are hashed before they are used; nothing is thrown away unread.
"""

import logging
import os
from contextlib import nullcontext
from functools import cache
from pathlib import Path

from weightstream.cachefs.store.files import store_errors
from weightstream.cachefs.store.opening import CHANGE, LOCK_TIMEOUT_S, BlobFiles
from weightstream.cachefs.store.state import ChunkState, indices, suspected
from weightstream.cachefs.store.stats import Counters
from weightstream.cachefs.store.table import Stamp

_log = logging.getLogger(__name__)


@cache
def current_boot_id() -> bytes:
    """Return 16 bytes that name this boot of the machine; zeros where the kernel does not tell.

    Without it FILLED chunks survive a restart as FILLED. That is safe, because no chunk found at
    opening is used or sealed before it was hashed; it only shows one state for another.
    """
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_bytes().decode()
        return bytes.fromhex(text.strip().replace("-", ""))
    except (OSError, ValueError) as error:
        _log.debug("no boot id: %s", error)
        return bytes(16)


def recover(files: BlobFiles, boot_id: bytes, counters: Counters) -> None:
    """Make what is uncertain SUSPECT, once, whoever else opens the blob at the same moment."""
    if not (_touched(files) or files.table.boot_id != boot_id):
        return
    # A read-only blob's table is a private copy: nobody to lock out.
    change = files.locks.hold(CHANGE, LOCK_TIMEOUT_S) if files.writable else nullcontext()
    with change:
        if _touched(files):
            _suspect_all(files, counters)
        if files.table.boot_id != boot_id:
            _suspect_filled(files, boot_id, counters)


def _touched(files: BlobFiles) -> bool:
    stamp = Stamp.of(files.data)
    seal = files.table.seal
    return stamp.size != files.table.header.blob.size or (seal is not None and seal != stamp)


def _suspect_all(files: BlobFiles, counters: Counters) -> None:
    blob = files.table.header.blob
    _log.warning("%s was changed by somebody: verifying %s", files.data.path, blob.uri)
    counters.add(touched_blobs=1)
    files.table.seal = None
    files.table.replace_states(suspected(files.table.states()))
    if files.writable and Stamp.of(files.data).size != blob.size:
        with store_errors(f"restore the size of {files.data.path}"):
            os.ftruncate(files.data.fileno(), blob.size)


def _suspect_filled(files: BlobFiles, boot_id: bytes, counters: Counters) -> None:
    filled = tuple(indices(files.table.states(), ChunkState.FILLED))
    for i in filled:
        files.table.set_state(i, ChunkState.SUSPECT)
    files.table.boot_id = boot_id
    if filled:
        uri = files.table.header.blob.uri
        _log.info("%d chunks of %s were not durable at the restart", len(filled), uri)
        counters.add(rebooted_blobs=1)
