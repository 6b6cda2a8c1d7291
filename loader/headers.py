"""Bring headers: out of a mapping, out of a running flow, or by one speculative range each.

256 KiB holds the header of nearly every shard (a shard of 8B parameters has some 10 KiB), and costs
less than a second round trip; a longer header takes one more range.
"""

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Priority, Wanted
from weightstream.loader.header import LENGTH_BYTES, Header, header_extent, parse_header
from weightstream.loader.host import HostLanding
from weightstream.loader.index import Index, check_index_size, parse_index
from weightstream.loader.mapped import map_blob
from weightstream.loader.model import ModelFiles
from weightstream.loader.session import Session

SPECULATIVE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class FetchedHeader:
    """A header, the landing it came into, and how many of the blob's first bytes are there."""

    header: Header
    landing: HostLanding
    known: Extent


def read_header(blob: Blob, read: Callable[[Extent], bytes]) -> Header:
    """Return the header, given what reads bytes of the blob."""
    if blob.size < LENGTH_BYTES:
        header_extent(blob, b"")
    extent = header_extent(blob, read(Extent(0, LENGTH_BYTES)))
    return parse_header(blob, read(extent))


def mapped_header(blob: Blob, memory: mmap.mmap) -> Header:
    """Return the header of a mapped blob."""
    return read_header(blob, lambda extent: memory[extent.start : extent.stop])


def landed_header(landing: HostLanding, wait: Callable[[Blob, Extent], None]) -> Header:
    """Return the header of a blob that is being fetched, as soon as its bytes are there."""

    def read(extent: Extent) -> bytes:
        wait(landing.blob, extent)
        return landing.bytes_of(extent)

    return read_header(landing.blob, read)


def fetch_headers(session: Session, blobs: Sequence[Blob]) -> dict[Blob, FetchedHeader]:
    """Fetch the headers of all blobs at once, and nothing else."""
    landings = {blob: HostLanding(blob) for blob in blobs if blob.size >= LENGTH_BYTES}
    for blob in blobs:
        if blob not in landings:
            header_extent(blob, b"")
    known = {blob: Extent(0, min(SPECULATIVE_BYTES, blob.size)) for blob in blobs}
    _fetch(session, landings, known)
    longer = {}
    for blob, landing in landings.items():
        stop = header_extent(blob, landing.bytes_of(Extent(0, LENGTH_BYTES))).stop
        if stop > known[blob].stop:
            longer[blob], known[blob] = Extent(known[blob].stop, stop), Extent(0, stop)
    _fetch(session, landings, longer)
    return {
        blob: FetchedHeader(read_header(blob, landing.bytes_of), landing, known[blob])
        for blob, landing in landings.items()
    }


def _fetch(
    session: Session, landings: dict[Blob, HostLanding], extents: dict[Blob, Extent]
) -> None:
    wanted = [
        Wanted(blob, landings[blob], (extent,), Priority.DEMAND) for blob, extent in extents.items()
    ]
    if wanted:
        with session.start(wanted) as flow:
            flow.join()
            flow.settle()


def read_index(session: Session, files: ModelFiles) -> Index | None:
    """Return the model's index, if it has one."""
    blob = files.index
    if blob is None:
        return None
    check_index_size(blob)
    if blob.size == 0:
        return parse_index(blob, b"")
    memory = map_blob(session, blob)
    if memory is not None:
        return parse_index(blob, memory[:])
    landing = HostLanding(blob)
    _fetch(session, {blob: landing}, {blob: blob.whole()})
    return parse_index(blob, landing.bytes_of(blob.whole()))
