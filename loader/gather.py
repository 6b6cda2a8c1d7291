"""Bring a model's bytes into host memory in file layout: mapped where they are here, else fetched.

Without `names` the whole of every missing blob is asked for before a header is known, headers
first, so not one speculative byte is wasted. With `names` the headers come first, by one range
each, and then only the bytes of the wanted tensors.
"""

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Flow, Wanted
from weightstream.loader.header import LENGTH_BYTES, header_extent
from weightstream.loader.headers import (
    fetch_headers,
    landed_header,
    mapped_header,
    read_index,
)
from weightstream.loader.host import HostLanding
from weightstream.loader.index import Index
from weightstream.loader.mapped import map_blob
from weightstream.loader.model import select_shards
from weightstream.loader.plan import Plan, Shard, holders, make_plan, wanted_extents, without
from weightstream.loader.report import Stopwatch
from weightstream.loader.resolve import Resolved
from weightstream.loader.session import Session
from weightstream.loader.views import check_types

TELL_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Weights:
    """The blobs that hold what is wanted; `memories` has those that lie on this machine."""

    index: Index | None
    blobs: tuple[Blob, ...]
    memories: Mapping[Blob, mmap.mmap]

    @property
    def missing(self) -> tuple[Blob, ...]:
        """Return the blobs that have to be fetched."""
        return tuple(blob for blob in self.blobs if blob not in self.memories)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Every wanted tensor's place, and the memory of each blob in file layout."""

    plan: Plan
    memories: Mapping[Blob, mmap.mmap]


def find_weights(session: Session, resolved: Resolved, names: frozenset[str] | None) -> Weights:
    """Return the model's blobs, those that are here already mapped."""
    index = read_index(session, resolved.files)
    shards = select_shards(resolved.files, index) if index else resolved.files.shards
    blobs = holders(shards, index, names)
    mapped = {blob: map_blob(session, blob) for blob in blobs}
    return Weights(index, blobs, {blob: m for blob, m in mapped.items() if m is not None})


def gather(
    session: Session, weights: Weights, names: frozenset[str] | None, watch: Stopwatch
) -> Gathered:
    """Return everything wanted in host memory that the caller may write to."""
    if not weights.missing:
        plan = _plan(weights, {}, names, watch)
        _count_mapped(plan, weights, watch)
        return Gathered(plan, weights.memories)
    fetch = _fetch_whole if names is None else _fetch_named
    return fetch(session, weights, names, watch)


def _fetch_whole(
    session: Session, weights: Weights, names: frozenset[str] | None, watch: Stopwatch
) -> Gathered:
    for blob in weights.missing:
        if blob.size < LENGTH_BYTES:
            header_extent(blob, b"")
    landings = {blob: HostLanding(blob) for blob in weights.missing}
    wanted = [Wanted(blob, landing, (blob.whole(),)) for blob, landing in landings.items()]

    def plan(flow: Flow) -> Plan:
        for blob in weights.missing:
            flow.boost(blob, Extent(0, LENGTH_BYTES))

        def wait(blob: Blob, extent: Extent) -> None:
            wait_telling(flow, blob, extent, watch)

        shards = {b: Shard(b, landed_header(landing, wait)) for b, landing in landings.items()}
        return _plan(weights, shards, names, watch)

    return _run(session, weights, landings, wanted, plan, watch)


def _fetch_named(
    session: Session, weights: Weights, names: frozenset[str] | None, watch: Stopwatch
) -> Gathered:
    fetched = fetch_headers(session, weights.missing)
    plan = _plan(weights, {b: Shard(b, one.header) for b, one in fetched.items()}, names, watch)
    landings = {blob: one.landing for blob, one in fetched.items()}
    wanted = [
        Wanted(blob, landings[blob], without(wanted_extents(places), fetched[blob].known))
        for blob, places in plan.by_blob().items()
        if blob in landings
    ]
    return _run(session, weights, landings, wanted, lambda _: plan, watch)


def _run(
    session: Session,
    weights: Weights,
    landings: Mapping[Blob, HostLanding],
    wanted: Sequence[Wanted],
    make: Callable[[Flow], Plan],
    watch: Stopwatch,
) -> Gathered:
    began_s = watch.now_s()
    with session.start(wanted) as flow:
        plan = make(flow)
        _count_mapped(plan, weights, watch)
        if watch.callback is not None:
            for one in wanted:
                for extent in one.extents[-1:]:
                    wait_telling(flow, one.blob, Extent(extent.stop - 1, extent.stop), watch)
        flow.join()  # not a wait for each blob: that looks at every piece at every arrival
        watch.end_flow(flow, began_s)
        flow.settle()
        watch.settle_s = watch.now_s()
    landed = {blob: landing.memory for blob, landing in landings.items()}
    return Gathered(plan, {**weights.memories, **landed})


def wait_telling(flow: Flow, blob: Blob, extent: Extent, watch: Stopwatch) -> None:
    """Wait for bytes, and tell the progress callback meanwhile, on the caller's own thread."""
    if watch.callback is None:
        flow.wait(blob, extent)
        return
    while True:
        try:
            flow.wait(blob, extent, timeout_s=TELL_EVERY_S)
            return
        except TimeoutError:
            watch.tell(flow)


def _plan(
    weights: Weights,
    fetched: Mapping[Blob, Shard],
    names: frozenset[str] | None,
    watch: Stopwatch,
) -> Plan:
    shards = [
        fetched[blob]
        if blob in fetched
        else Shard(blob, mapped_header(blob, weights.memories[blob]))
        for blob in weights.blobs
    ]
    plan = make_plan(shards, weights.index, names)
    watch.header_s = watch.now_s()
    check_types(plan.places)  # the first to need torch, which may be being imported meanwhile
    return plan


def _count_mapped(plan: Plan, weights: Weights, watch: Stopwatch) -> None:
    watch.mapped_bytes = sum(
        len(place.info.extent) for place in plan.places if place.blob in weights.memories
    )
