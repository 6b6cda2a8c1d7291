"""The store: one directory of blobs, shared by every process of the node, with no daemon.

Everything that must agree between processes lies in the files and in kernel locks on them; this
object holds only what threads of one process share: which blobs they have open.
"""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store import listing
from weightstream.cachefs.store.direct import DirectWriter
from weightstream.cachefs.store.evict import Limits, Space, choose_victims, room_bytes
from weightstream.cachefs.store.files import store_errors
from weightstream.cachefs.store.info import BlobInfo, allocated_bytes, inspect, is_under
from weightstream.cachefs.store.layout import open_layout
from weightstream.cachefs.store.listing import StoredListing
from weightstream.cachefs.store.locks import LockFile, survive_fork
from weightstream.cachefs.store.opening import (
    BlobFiles,
    find_files,
    open_files,
    open_or_create,
    remove_files,
)
from weightstream.cachefs.store.recovery import current_boot_id, recover
from weightstream.cachefs.store.scrub import Scrubber, ScrubProgress, ScrubReport
from weightstream.cachefs.store.stats import Counters, StoreStats
from weightstream.cachefs.store.stored import StoredBlob
from weightstream.cachefs.store.table import DamagedTable, Header
from weightstream.errors import StoreError, StoreReadOnlyError
from weightstream.settings import Settings

_log = logging.getLogger(__name__)


class Store:
    """An open store. Thread-safe, and usable in forked children."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self._layout, self.writable = open_layout(path)
        self._chunk_size = settings.chunk_size
        self._limits = Limits(settings.store_max_bytes, settings.store_min_free_bytes)
        self._writer = DirectWriter(settings.direct_io, path)
        self._counters = Counters()
        self._blobs: dict[str, StoredBlob] = {}
        self._handles: dict[str, int] = {}
        with store_errors(f"open {self._layout.lock}"):
            self._names = LockFile(self._layout.lock, create=True) if self.writable else None
        self._mutex = threading.Lock()
        survive_fork(self)

    @classmethod
    def open(cls, settings: Settings) -> "Store":
        """Open the store that the settings name, making it when there is nothing yet."""
        return cls(settings.store.expanduser().absolute(), settings)

    def after_fork_in_child(self) -> None:
        """Replace the mutexes: another thread of the parent may have held them."""
        self._mutex = threading.Lock()
        self._counters.after_fork_in_child()
        self._writer.after_fork_in_child()

    def _writable_names(self) -> LockFile:
        if self._names is None:
            raise StoreReadOnlyError(f"cannot write the store {self.path}: no permission")
        return self._names

    # ---- blobs

    def open_blob(self, blob: Blob) -> StoredBlob:
        """Open a blob, making an empty one when it is missing; a use that counts for eviction."""
        if not blob.version:
            raise StoreError(f"{blob.uri} has no version: it cannot be stored")
        stored = self._share(blob)
        if stored is None:
            stored = self._enter(self._open_files(blob))
        stored.touch()
        return stored

    def _open_files(self, blob: Blob) -> BlobFiles:
        if self._names is None:
            files = self._find(blob)
            if files is None:
                raise StoreReadOnlyError(f"cannot add {blob.uri} to the read-only {self.path}")
            return files
        header = Header(blob, self._chunk_size)
        return open_or_create(self._layout, self._names, header, self._counters)

    def find_blob(self, blob: Blob) -> StoredBlob | None:
        """Open a blob if it is in the store; nothing is made or repaired."""
        if not blob.version:
            return None
        stored = self._share(blob)
        if stored is not None:
            return stored
        files = self._find(blob)
        return None if files is None else self._enter(files)

    def _find(self, blob: Blob) -> BlobFiles | None:
        try:
            return find_files(self._layout, blob, self.writable)
        except DamagedTable as error:
            _log.debug("ignoring a damaged blob: %s", error)
            return None

    def _open_by_id(self, blob_id: str) -> StoredBlob | None:
        with self._mutex:
            stored = self._blobs.get(blob_id)
        if stored is not None:
            return self._share(stored.blob)
        files = open_files(self._layout, blob_id, self.writable)
        return None if files is None else self._enter(files)

    def _share(self, blob: Blob) -> StoredBlob | None:
        """Return one more handle of a blob that this process has open."""
        with self._mutex:
            stored = self._blobs.get(blob.id)
            if stored is not None:
                self._handles[blob.id] += 1
            return stored

    def _enter(self, files: BlobFiles) -> StoredBlob:
        """Return a handle for newly opened files, or for those another thread just opened."""
        recover(files, current_boot_id(), self._counters)
        stored = StoredBlob(files, self._writer, self._counters, self._leave)
        with self._mutex:
            stored = self._blobs.setdefault(stored.blob.id, stored)
            self._handles[stored.blob.id] = self._handles.get(stored.blob.id, 0) + 1
            return stored

    def _leave(self, stored: StoredBlob) -> bool:
        """Take a handle back; say whether it was the last one."""
        blob_id = stored.blob.id
        with self._mutex:
            if self._blobs.get(blob_id) is not stored:
                return False
            self._handles[blob_id] -= 1
            if self._handles[blob_id]:
                return False
            del self._blobs[blob_id], self._handles[blob_id]
            return True

    def blobs(self) -> Iterator[BlobInfo]:
        """Yield all that is stored; damaged blobs are left to `scrub`."""
        for blob_id in self._layout.blob_ids():
            try:
                info = inspect(self._layout, blob_id)
            except DamagedTable as error:
                _log.debug("skipping a damaged blob: %s", error)
                continue
            if info is not None:
                yield info

    # ---- space

    def usage_bytes(self) -> int:
        """Return the space that blobs take on the disk."""
        total = 0
        for path in self._layout.files():
            try:
                total += allocated_bytes(path)
            except FileNotFoundError:
                continue  # evicted by another process meanwhile
        return total

    def room_bytes(self) -> int:
        """Return how much may still be stored without eviction; negative beyond a limit."""
        return room_bytes(self._space(), self._limits)

    def _space(self) -> Space:
        with store_errors(f"look at {self.path}"):
            disk = os.statvfs(self.path)
            return Space(self.usage_bytes(), disk.f_bavail * disk.f_frsize)

    def evict(self, needed_bytes: int = 0) -> list[BlobInfo]:
        """Remove blobs until `needed_bytes` fit within the limits; return what was removed."""
        self._writable_names()
        removed: list[BlobInfo] = []
        space = self._space()
        if room_bytes(space, self._limits) >= needed_bytes:
            return removed
        for info in choose_victims(self.blobs(), space, self._limits, needed_bytes):
            if self._remove(info):
                removed.append(info)
        freed_bytes = sum(info.allocated_bytes for info in removed)
        self._counters.add(evicted_blobs=len(removed), evicted_bytes=freed_bytes)
        return removed

    def remove(self, uri_prefix: str) -> list[BlobInfo]:
        """Remove the blobs at and below a URI, pinned ones too; what is in use stays."""
        self._writable_names()
        found = [info for info in self.blobs() if is_under(info.blob.uri, uri_prefix)]
        removed = [info for info in found if self._remove(info)]
        for info in found:
            if info not in removed:
                _log.warning("%s stays in the store: it is in use", info.blob.uri)
        return removed

    def _remove(self, info: BlobInfo) -> bool:
        if not remove_files(self._layout, self._writable_names(), info.blob.id):
            return False
        _log.info("removed %s from the store: %d bytes", info.blob.uri, info.allocated_bytes)
        return True

    def pin(self, uri_prefix: str, pinned: bool = True) -> int:
        """Keep the blobs at and below a URI from eviction, or no longer; return how many."""
        self._writable_names()
        count = 0
        for info in self.blobs():
            if not is_under(info.blob.uri, uri_prefix):
                continue
            files = open_files(self._layout, info.blob.id, writable=True)
            if files is not None and files.writable:
                files.table.pinned = pinned
                count += 1
        return count

    def scrub(self, progress: ScrubProgress | None = None) -> ScrubReport:
        """Hash everything stored and drop what is wrong; see scrub.py."""
        return Scrubber(self._layout, self._writable_names(), self._open_by_id, progress).run()

    # ---- listings

    def save_listing(self, uri: str, blobs: tuple[Blob, ...]) -> None:
        """Keep what the origin listed under `uri`."""
        self._writable_names()
        listing.save_listing(self._layout, uri, blobs)

    def load_listing(self, uri: str) -> StoredListing | None:
        """Return what the origin listed under `uri` when it was last asked."""
        return listing.load_listing(self._layout, uri)

    # ---- life

    def stats(self) -> StoreStats:
        """Return what happened in the store since this process opened it."""
        return self._counters.snapshot()

    def close(self) -> None:
        """Close every blob, whoever has handles, and free every lock."""
        with self._mutex:
            blobs = list(self._blobs.values())
            self._blobs.clear()
            self._handles.clear()
        for stored in blobs:
            stored.shut()
        if self._names is not None:
            self._names.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
