"""Bring a model into the store: every file under a URI, without torch and without tensors.

A load keeps what it can while nobody waits; a prefetch is the other way round: everything must be
kept, and the link may wait for the disk. So it fetches behind everybody else (BACKGROUND: ranges
wait for memory and never push a queued write-back out), and what the haste of another flow made the
write-back skip is fetched once more.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, Flow, Lease, Priority, Progress, SlabPool, Wanted
from weightstream.cachefs.fetch import process_engine as engine_of
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.origin import open_origin
from weightstream.cachefs.store import Store
from weightstream.errors import StoreError, StoreFullError, UsageError
from weightstream.settings import Settings, format_bytes

_ATTEMPTS = 3
_TELL_EVERY_S = 0.1

ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class PrefetchReport:
    """What a prefetch brought in."""

    uri: str
    files: int
    bytes_total: int
    bytes_fetched: int
    unversioned: tuple[str, ...]
    """URIs of files whose origin names no version: they cannot be kept."""
    elapsed_s: float


class SlabLanding:
    """Bytes land in the engine's slabs, from where the write-back takes them; nobody reads them."""

    exposes_memory = False

    def __init__(self, slabs: SlabPool) -> None:
        self._slabs = slabs

    def reserve(self, extent: Extent) -> Lease | None:
        """Return a slab when the budget has room."""
        return self._slabs.try_take(len(extent))

    def landed(self, extent: Extent) -> None:
        """Ignore it: what matters is that the chunk is kept."""


def prefetch(
    uri: str,
    settings: Settings,
    store: Store,
    progress: ProgressCallback | None = None,
    storage_options: Mapping[str, object] | None = None,
    source: Source | None = None,
) -> PrefetchReport:
    """Bring every file under `uri` into the store; return when all is durable there.

    The bytes come from `source` where one is given (peers), else from the origin. Asks the origin
    what there is, whatever the store remembers. Raises `StoreFullError` before it fetches anything
    when the model cannot fit.
    """
    if settings.write_back == "off":
        raise UsageError("prefetch needs write_back=on")
    began_s = time.monotonic()
    origin = open_origin(uri, settings, storage_options)
    try:
        listing = origin.list(uri)
        if any(origin.local_path(blob) is not None for blob in listing):
            raise UsageError(f"{uri} is on this machine already; loading reads it in place")
        store.save_listing(uri.rstrip("/"), listing)
        keepable = [blob for blob in listing if blob.version and blob.size]
        job = _Prefetch(uri, source or origin, store, engine_of(settings), keepable, progress)
        fetched = job.run(settings)
    finally:
        origin.close()
    return PrefetchReport(
        uri=uri,
        files=len(listing),
        bytes_total=sum(blob.size for blob in listing),
        bytes_fetched=fetched,
        unversioned=tuple(blob.uri for blob in listing if not blob.version),
        elapsed_s=time.monotonic() - began_s,
    )


@dataclass(frozen=True, slots=True)
class _Prefetch:
    uri: str
    source: Source
    store: Store
    engine: Engine
    blobs: Sequence[Blob]
    progress: ProgressCallback | None

    def run(self, settings: Settings) -> int:
        """Fetch until nothing is missing; return how many bytes the source gave."""
        fetched = 0
        missing = self._missing()
        self._make_room(missing)
        for _ in range(_ATTEMPTS):
            if not missing:
                return fetched
            fetched += self._fetch(missing)
            self._wait_for_disk(settings.deadline_s)
            missing = self._missing()
        if missing:
            raise StoreError(f"{self.uri}: {self._lacking(missing)} was fetched but not kept")
        return fetched

    def _missing(self) -> dict[Blob, tuple[Extent, ...]]:
        """Return what is not in the store; blobs that only want their seal have no extents."""
        found: dict[Blob, tuple[Extent, ...]] = {}
        for blob in self.blobs:
            stored = self.store.find_blob(blob)
            if stored is None:
                found[blob] = (blob.whole(),)
                continue
            with stored:
                if not stored.complete:
                    found[blob] = stored.holes()
        return found

    def _make_room(self, missing: Mapping[Blob, Sequence[Extent]]) -> None:
        needed = _total(missing)
        if self.store.room_bytes() < needed:
            self.store.evict(needed)
        room = self.store.room_bytes()
        if room < needed:
            short = f"{format_bytes(needed)} to fetch, room for {format_bytes(max(0, room))}"
            raise StoreFullError(f"{self.uri} does not fit into {self.store.path}: {short}")

    def _fetch(self, missing: Mapping[Blob, tuple[Extent, ...]]) -> int:
        landing = SlabLanding(self.engine.slabs)
        wanted = [
            Wanted(blob, landing, extents, Priority.BACKGROUND) for blob, extents in missing.items()
        ]
        here = sum(blob.size for blob in self.blobs) - _total(missing)
        with self.engine.start(wanted, self.source, self.store) as flow:
            for one in wanted:
                for extent in one.extents:
                    self._await(flow, one.blob, extent, here)
            flow.join()
            self._tell(flow, here)
            return flow.progress().bytes_by_source.get(self.source.name, 0)

    def _await(self, flow: Flow, blob: Blob, extent: Extent, here: int) -> None:
        while True:
            try:
                return flow.wait(blob, extent, timeout_s=_TELL_EVERY_S)
            except TimeoutError:
                self._tell(flow, here)

    def _tell(self, flow: Flow, here: int) -> None:
        """Report the flow on top of what was in the store before."""
        if self.progress is None:
            return
        now = flow.progress()
        sources = {**now.bytes_by_source}
        sources["store"] = sources.get("store", 0) + here
        self.progress(
            replace(
                now,
                bytes_done=now.bytes_done + here,
                bytes_total=now.bytes_total + here,
                bytes_by_source=sources,
            )
        )

    def _wait_for_disk(self, patience_s: float) -> None:
        """Wait for the write-back as long as it gets anywhere."""
        before, since_s = -1, time.monotonic()
        while not self.engine.write_back.drain(1.0):
            now = self.store.usage_bytes()
            if now != before:
                before, since_s = now, time.monotonic()
            elif time.monotonic() - since_s > patience_s:
                raise StoreError(f"{self.store.path}: the disk made no progress for {patience_s} s")

    def _lacking(self, missing: Mapping[Blob, Sequence[Extent]]) -> str:
        return f"{format_bytes(_total(missing))} in {len(missing)} files"


def _total(missing: Mapping[Blob, Sequence[Extent]]) -> int:
    return sum(len(extent) for extents in missing.values() for extent in extents)
