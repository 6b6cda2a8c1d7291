"""The manifests that a process has met: what a chunk's hash must be, where that was published.

A lookup is on the way of a chunk to its reader, so a manifest is fetched aside, and waited for once
and briefly. Without one the answer is None, and that is remembered for a while: most models have
none. A manifest that is not valid counts as none, with a warning: whoever can spoil it could as
well delete it.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.cachefs.origin.base import StorageOptions
from weightstream.cachefs.origin.forks import forget_in_child
from weightstream.errors import (
    FormatError,
    IntegrityError,
    WeightstreamError,
)
from weightstream.p2p.manifest.fetching import find_manifest
from weightstream.p2p.manifest.manifest import Manifest
from weightstream.p2p.manifest.paths import manifest_uri
from weightstream.p2p.manifest.signing import check_signature
from weightstream.settings import Settings

log = logging.getLogger(__name__)

AGAIN_S = 60.0
"""How long it is believed that a folder has no manifest, or none of a new version."""

_MOST_FOLDERS = 64
_MOST_LEVELS = 4
"""Of folders above a file that may be its model's: pipelines keep their parts in folders."""


class _Answer:
    """What was asked for one folder."""

    def __init__(self) -> None:
        self.asked_s = time.monotonic()
        self.there = threading.Event()
        self.manifest: Manifest | None = None


class Manifests:
    """Manifests by the folder of the blobs that they are about. Thread-safe; fetches aside."""

    def __init__(
        self,
        settings: Settings,
        wait_s: float = 1.0,
        storage_options: StorageOptions | None = None,
        origin_of: Callable[[Blob], Origin | None] | None = None,
    ) -> None:
        """`wait_s` is the longest that a folder's manifest is waited for, by all its chunks.

        Manifests are read from what `origin_of` returns, where it is given: origins that somebody
        has open. None of a blob whose origin may not be read.
        """
        self._origin_of = origin_of
        self._settings = settings
        self._wait_s = wait_s
        self._options = storage_options
        self._key = manifest_key(settings)
        self.forget()
        forget_in_child(self)

    def forget(self) -> None:
        """Start with an empty memory, as in a forked child."""
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, _Answer] = OrderedDict()

    def digest(self, blob: Blob, chunk_size: int, i: int) -> bytes | None:
        """Return the published BLAKE3 of chunk `i`, or None when nothing is known of it."""
        manifest = self.of(blob)
        if manifest is None or manifest.chunk_size != chunk_size:
            return None
        return manifest.digest(blob, i)

    def of(self, blob: Blob) -> Manifest | None:
        """Return the manifest that has exactly this blob."""
        answer = self._answer(blob)
        answer.there.wait(max(0.0, answer.asked_s + self._wait_s - time.monotonic()))
        manifest = answer.manifest
        return manifest if manifest is not None and manifest.file_of(blob) is not None else None

    def _answer(self, blob: Blob) -> _Answer:
        """Return the folder's answer, asking anew when it has aged and is of no use."""
        folder = blob.uri.rpartition("/")[0]
        with self._lock:
            answer = self._answers.get(folder)
            if answer is not None and not self._is_stale(answer, blob):
                self._answers.move_to_end(folder)
                return answer
            answer = self._answers[folder] = _Answer()
            while len(self._answers) > _MOST_FOLDERS:
                self._answers.popitem(last=False)
        threading.Thread(
            target=self._ask, args=(folder, answer, blob), daemon=True, name="weightstream-manifest"
        ).start()
        return answer

    def _is_stale(self, answer: _Answer, blob: Blob) -> bool:
        if not answer.there.is_set() or time.monotonic() - answer.asked_s < AGAIN_S:
            return False
        return answer.manifest is None or answer.manifest.file_of(blob) is None

    def _ask(self, folder: str, answer: _Answer, blob: Blob) -> None:
        try:
            answer.manifest = self._find(folder, blob)
        except WeightstreamError as error:
            log.debug("no manifest of %s: %s", folder, error)
        finally:
            answer.there.set()

    def _find(self, folder: str, blob: Blob) -> Manifest | None:
        """Return the manifest of the nearest folder that has one."""
        if self._origin_of is not None:
            origin = self._origin_of(blob)
            return None if origin is None else self._look(origin, folder)
        origin = open_origin(folder, self._settings, self._options)
        try:
            return self._look(origin, folder)
        finally:
            origin.close()

    def _look(self, origin: Origin, folder: str) -> Manifest | None:
        for model_uri in folders_above(folder):
            try:
                found = find_manifest(origin, model_uri, self._settings.deadline_s)
                if found is not None:
                    check_key(found, self._key)
                    return found
            except (FormatError, IntegrityError) as error:
                log.warning("a manifest is ignored: %s", error)
                return None
        return None


def manifest_key(settings: Settings) -> Path | None:
    """Return the public key that manifests must be signed with, where one is configured."""
    text = settings.manifest_key_file
    return Path(text).expanduser() if text else None


def check_key(manifest: Manifest, key: Path | None) -> None:
    """Raise `IntegrityError` unless the manifest is signed as configured."""
    if key is not None:
        check_signature(manifest, key, manifest_uri(manifest.uri))


def folders_above(folder: str) -> list[str]:
    """Return a folder and those above it that may be a model; never a bare scheme or host."""
    scheme, separator, path = folder.partition("://")
    parts = (path if separator else folder).split("/")
    least = 2 if scheme in ("http", "https") or not parts[0] else 1
    start = f"{scheme}://" if separator else ""
    levels = range(len(parts), max(least - 1, len(parts) - _MOST_LEVELS), -1)
    return [start + "/".join(parts[:count]) for count in levels]
