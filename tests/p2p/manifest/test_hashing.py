"""However the bytes of a file arrive, their hashes are those of the file."""

from dataclasses import dataclass

import pytest
from awscrt import checksums
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.models import random_bytes
from tests.p2p.manifest.test_torrent import hashed

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import SlabPool
from weightstream.cachefs.fetch.budget import MemoryBudget
from weightstream.errors import StoreError
from weightstream.p2p.manifest.hashing import HashingLanding
from weightstream.p2p.manifest.torrent import torrent_file, unit_bytes

KIB, MIB = 1 << 10, 1 << 20
DATA = random_bytes(3 * MIB, "hashing")


@dataclass(frozen=True, slots=True)
class Arrival:
    """A file, the runs of chunks that are asked for, and the steps in which they arrive."""

    size: int
    chunk_size: int
    runs: tuple[int, ...]
    steps: tuple[int, ...]


arrivals = st.builds(
    Arrival,
    size=st.integers(1, len(DATA)) | st.sampled_from([16 * KIB, MIB, 2 * MIB, MIB + 1]),
    chunk_size=st.sampled_from([64 * KIB, 80 * KIB, 256 * KIB, MIB, 2 * MIB]),
    runs=st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple),
    steps=st.lists(st.integers(3000, 400_000), min_size=1, max_size=9).map(tuple),
)


def extents(arrival: Arrival) -> list[Extent]:
    """Return the ranges that are asked for."""
    found, at, turn = [], 0, 0
    while at < arrival.size:
        length = arrival.runs[turn % len(arrival.runs)] * arrival.chunk_size
        found.append(Extent(at, min(at + length, arrival.size)))
        at, turn = found[-1].stop, turn + 1
    return found


def land(landing: HashingLanding, arrival: Arrival) -> None:
    """Let the ranges arrive side by side, a step of each in turn, the last range first."""
    leases = {}
    for extent in extents(arrival):
        lease = landing.reserve(extent)
        assert lease is not None
        leases[extent] = lease
    position = {extent: extent.start for extent in leases}
    turn = 0
    while waiting := [e for e in reversed(position) if position[e] < e.stop]:
        for extent in waiting:
            at = position[extent]
            stop = min(at + arrival.steps[turn % len(arrival.steps)], extent.stop)
            turn += 1
            view = leases[extent].view
            view[at - extent.start : stop - extent.start] = DATA[at:stop]
            position[extent] = stop
            landing.landed(Extent(at, stop))
            if stop == extent.stop:
                leases[extent].release()


@settings(deadline=None, max_examples=50)
@given(arrivals, st.booleans())
def test_hashes_are_those_of_the_file(arrival: Arrival, torrent: bool) -> None:
    data, size = DATA[: arrival.size], arrival.chunk_size
    slabs = SlabPool(MemoryBudget(64 * MIB))
    blob = Blob("s3://b/f", arrival.size, "v")
    landing = HashingLanding(blob, size, slabs, torrent=torrent)
    land(landing, arrival)
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    assert landing.digests == b"".join(blake3(chunk).digest() for chunk in chunks)
    assert landing.crc64nvme == checksums.crc64nvme(data)
    if torrent:
        found = torrent_file("f", len(data), landing.units, unit_bytes(size))
        assert found == hashed("f", data, size)


def test_range_that_is_asked_for_again_starts_over() -> None:
    """The engine gives a range back when the store cannot read it, and asks once more."""
    landing = HashingLanding(
        Blob("s3://b/f", MIB, "v"), MIB, SlabPool(MemoryBudget(64 * MIB)), torrent=True
    )
    for _ in range(2):
        lease = landing.reserve(Extent(0, MIB))
        assert lease is not None
        lease.view[:] = bytes(MIB)
        lease.release()
    land(landing, Arrival(MIB, MIB, (1,), (100_000,)))
    assert landing.digests == blake3(DATA[:MIB]).digest()


def test_range_that_is_not_of_whole_chunks_is_refused() -> None:
    landing = HashingLanding(
        Blob("s3://b/f", 3 * MIB, "v"), MIB, SlabPool(MemoryBudget(64 * MIB)), torrent=False
    )
    for extent in (Extent(0, MIB // 2), Extent(MIB // 2, MIB), Extent(5, 3 * MIB)):
        with pytest.raises(StoreError, match="other chunks"):
            landing.reserve(extent)


def test_no_memory_is_no_range() -> None:
    slabs = SlabPool(MemoryBudget(MIB))
    landing = HashingLanding(Blob("s3://b/f", 3 * MIB, "v"), MIB, slabs, torrent=False)
    first = landing.reserve(Extent(0, MIB))
    assert first is not None
    assert landing.reserve(Extent(MIB, 2 * MIB)) is None
    first.release()
    assert landing.reserve(Extent(MIB, 2 * MIB)) is not None
