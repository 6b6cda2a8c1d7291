"""Reading everything the store holds, to find what the disk changed behind its back.

Every chunk is hashed whatever the seals say; wrong ones are dropped and will be fetched again.
Tables that cannot be believed, data without a table and forgotten temporary files are removed.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from weightstream.cachefs.store.files import store_errors
from weightstream.cachefs.store.info import BlobInfo, inspect
from weightstream.cachefs.store.layout import Layout
from weightstream.cachefs.store.locks import LockFile
from weightstream.cachefs.store.opening import remove_files, remove_orphan
from weightstream.cachefs.store.stored import StoredBlob
from weightstream.cachefs.store.table import DamagedTable

# A temporary file this old belongs to nobody who still runs.
_STALE_S = 3600.0
_log = logging.getLogger(__name__)

ScrubProgress = Callable[[BlobInfo, int], None]


@dataclass(frozen=True, slots=True)
class ScrubReport:
    """What a scrub read, and what it took away."""

    blobs: int
    checked_bytes: int
    dropped_chunks: int
    damaged_blobs: tuple[str, ...]
    """URIs of the blobs that lost chunks."""
    removed_files: int
    """Damaged tables, data without a table, stale temporary files."""
    elapsed_s: float


@dataclass(slots=True)
class Scrubber:
    """One scrub of one store."""

    layout: Layout
    names: LockFile
    open_by_id: Callable[[str], StoredBlob | None]
    progress: ScrubProgress | None = None
    _blobs: int = 0
    _checked_bytes: int = 0
    _dropped: int = 0
    _damaged: list[str] = field(default_factory=list)
    _removed: int = 0

    def run(self) -> ScrubReport:
        """Verify every blob, then remove what belongs to none."""
        started_s = time.monotonic()
        for blob_id in list(self.layout.blob_ids()):
            self._scrub_blob(blob_id)
        for path in list(self._orphans()):
            self._remove(path)
        return ScrubReport(
            self._blobs,
            self._checked_bytes,
            self._dropped,
            tuple(self._damaged),
            self._removed,
            time.monotonic() - started_s,
        )

    def _scrub_blob(self, blob_id: str) -> None:
        try:
            info = inspect(self.layout, blob_id)
            stored = self.open_by_id(blob_id)
        except DamagedTable as error:
            _log.warning("removing a damaged blob: %s", error)
            self._removed += remove_files(self.layout, self.names, blob_id)
            return
        if info is None or stored is None:
            return
        with stored:
            dropped = self._verify(stored, info)
        self._blobs += 1
        if dropped:
            self._dropped += dropped
            self._damaged.append(info.blob.uri)

    def _verify(self, stored: StoredBlob, info: BlobInfo) -> int:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.progress is not None:
                self.progress(info, done)

        dropped = stored.verify(everything=True, progress=advance)
        self._checked_bytes += done
        return dropped

    def _orphans(self) -> Iterator[Path]:
        for path in self.layout.files():
            orphan = path.suffix == ".data" and not path.with_suffix(".table").exists()
            if orphan or (path.suffix == ".tmp" and _age_s(path) > _STALE_S):
                yield path

    def _remove(self, path: Path) -> None:
        if path.suffix == ".data":
            removed = remove_orphan(self.layout, self.names, path.stem)
        else:
            with store_errors(f"remove {path}"):
                path.unlink(missing_ok=True)
            removed = True
        self._removed += removed
        if removed:
            _log.info("removed %s, which belonged to no blob", path)


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
