"""Read every byte of a model once and hash it on the way, at the speed of the link.

The chunks that the local store has come from there; nothing is added to it. The memory for what is
in flight is the engine's budget, whatever the model's size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, Flow, Progress, Wanted, process_engine
from weightstream.cachefs.origin import Origin
from weightstream.cachefs.store import Store
from weightstream.p2p.manifest.hashing import HashingLanding
from weightstream.settings import Settings

_TELL_EVERY_S = 0.1

ProgressCallback = Callable[[Progress], None]


def reading_settings(settings: Settings, chunk_size: int) -> Settings:
    """Return settings for an engine that cuts files into these chunks and keeps nothing."""
    return settings.model_copy(update={"chunk_size": chunk_size, "write_back": "off"})


def landings_for(
    blobs: Sequence[Blob], settings: Settings, *, torrent: bool
) -> dict[Blob, HashingLanding]:
    """Return what will hash each blob in chunks of `settings.chunk_size`."""
    slabs, size = process_engine(settings).slabs, settings.chunk_size
    return {blob: HashingLanding(blob, size, slabs, torrent=torrent) for blob in blobs}


def read_all(
    landings: Mapping[Blob, HashingLanding],
    origin: Origin,
    store: Store | None,
    settings: Settings,
    progress: ProgressCallback | None = None,
) -> Progress:
    """Read every byte into the landings; return what it took.

    `settings` are those of `reading_settings`. Raises `IntegrityError` when what arrived has not
    the checksum that the origin keeps; everything has landed then.
    """
    engine = process_engine(settings)
    done = Progress(0, sum(blob.size for blob in landings))
    filled = {blob: landing for blob, landing in landings.items() if blob.size}
    for some, kept in _by_store(filled, store, settings.chunk_size):
        done = _read(some, origin, kept, engine, _told(progress, done))
    return done


def _by_store(
    landings: Mapping[Blob, HashingLanding], store: Store | None, chunk_size: int
) -> list[tuple[Mapping[Blob, HashingLanding], Store | None]]:
    """Part the blobs whose stored chunks are of our size from those that the store cannot give."""
    if store is None:
        return [(landings, None)]
    foreign = {blob for blob in landings if not _fits(store, blob, chunk_size)}
    own = {blob: landing for blob, landing in landings.items() if blob not in foreign}
    rest = {blob: landing for blob, landing in landings.items() if blob in foreign}
    return [(own, store), (rest, None)]


def _fits(store: Store, blob: Blob, chunk_size: int) -> bool:
    stored = store.find_blob(blob)
    if stored is None:
        return True
    with stored:
        return stored.chunk_size == chunk_size


def _read(
    landings: Mapping[Blob, HashingLanding],
    origin: Origin,
    store: Store | None,
    engine: Engine,
    tell: Callable[[Progress], Progress],
) -> Progress:
    wanted = [Wanted(blob, landing, (blob.whole(),)) for blob, landing in landings.items()]
    with engine.start(wanted, origin, store) as flow:
        for blob in landings:
            _await(flow, blob, blob.whole(), tell)
        flow.join()
        return tell(flow.progress())


def _await(flow: Flow, blob: Blob, extent: Extent, tell: Callable[[Progress], Progress]) -> None:
    while True:
        try:
            return flow.wait(blob, extent, timeout_s=_TELL_EVERY_S)
        except TimeoutError:
            tell(flow.progress())


def _told(progress: ProgressCallback | None, before: Progress) -> Callable[[Progress], Progress]:
    """Return what adds one flow's progress to that of the flows before it, and reports it."""

    def tell(now: Progress) -> Progress:
        sources = dict(before.bytes_by_source)
        for name, count in now.bytes_by_source.items():
            sources[name] = sources.get(name, 0) + count
        done = before.bytes_done + now.bytes_done
        total = before.bytes_total
        both = replace(now, bytes_done=done, bytes_total=total, bytes_by_source=sources)
        if progress is not None:
            progress(both)
        return both

    return tell
