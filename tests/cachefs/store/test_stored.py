"""What one blob in the store promises, seen from one process."""

import os
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from tests.cachefs.store.blobs import (
    CHUNK,
    content_of,
    fill,
    make_blob,
    open_store,
    piece_of,
    put,
    read_chunk,
    store_blob,
)

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store import ChunkState
from weightstream.cachefs.store.files import read_ahead
from weightstream.cachefs.store.state import present_bytes
from weightstream.errors import StoreError, UsageError

EMPTY, FILLED, DURABLE, SUSPECT = ChunkState


def test_a_chunk_is_empty_then_filled_then_durable(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.states() == bytes(5)
        put(stored, 1, 4)
        assert [stored.state(i) for i in range(5)] == [EMPTY, FILLED, EMPTY, EMPTY, FILLED]
        stored.sync()
        assert [stored.state(i) for i in range(5)] == [EMPTY, DURABLE, EMPTY, EMPTY, DURABLE]
        assert stored.present_bytes() == CHUNK + 777
        assert not stored.complete


def test_a_full_blob_is_complete_only_when_it_is_sealed(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        put(stored, *range(5))
        assert not stored.complete
        with pytest.raises(StoreError, match="not complete"):
            stored.map()
        stored.sync()
        assert stored.complete
        assert stored.map()[:] == content_of(stored.blob)


@pytest.mark.parametrize("direct_io", ["auto", "on", "off"])
def test_bytes_come_back_however_they_were_written(tmp_path: Path, direct_io: str) -> None:
    with open_store(tmp_path, direct_io=direct_io) as store:
        with store.open_blob(make_blob()) as stored:
            fill(stored)
        assert stored.data_path.read_bytes() == content_of(stored.blob)


def test_memory_that_is_not_aligned_or_not_writable_is_written_too(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        data = piece_of(stored, 0)
        stored.write(0, memoryview(data), blake3(data).digest(), 1)
        odd = bytearray(b"x") + piece_of(stored, 1)
        stored.write(1, memoryview(odd)[1:], blake3(odd[1:]).digest(), 2)
        assert [read_chunk(stored, i) for i in (0, 1)] == [piece_of(stored, 0), piece_of(stored, 1)]


def test_a_chunk_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        put(stored, 0)
        other = bytes(CHUNK)
        stored.write(0, memoryview(other), blake3(other).digest(), 9)
        assert read_chunk(stored, 0) == piece_of(stored, 0)
        assert (stored.digest(0), stored.crc64(0)) == (blake3(piece_of(stored, 0)).digest(), 0)


def test_hashes_of_a_missing_chunk_are_an_error(tmp_path: Path) -> None:
    with (
        open_store(tmp_path) as store,
        store.open_blob(make_blob()) as stored,
        pytest.raises(StoreError, match="bytes 0-65535 is not in the store"),
    ):
        stored.digest(0)


def test_a_chunk_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        with pytest.raises(UsageError):
            stored.write(4, memoryview(bytes(CHUNK)), bytes(32), 0)
        with pytest.raises(UsageError):
            stored.read_into(4, 700, memoryview(bytearray(78)))
        with pytest.raises(IndexError):
            stored.state(5)


@given(offset=st.integers(0, CHUNK), length=st.integers(0, CHUNK))
def test_any_part_of_a_chunk_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, offset: int, length: int
) -> None:
    root = tmp_path_factory.getbasetemp() / "parts"
    with open_store(root) as store, store.open_blob(make_blob(chunks=1)) as stored:
        if not stored.complete:
            fill(stored)
        part = memoryview(bytearray(min(length, CHUNK - offset)))
        assert stored.read_into(0, offset, part)
        assert part == piece_of(stored, 0)[offset : offset + len(part)]


def test_a_missing_chunk_reads_as_false(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert read_chunk(stored, 0) is None


def test_what_is_written_to_a_mapping_stays_in_the_process(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        fill(stored)
        mapped = stored.map()
        mapped[0:3] = b"abc"
        assert mapped[0:3] == b"abc"
        assert stored.map()[:] == content_of(stored.blob)
        assert stored.complete


def test_a_mapping_outlives_the_store(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        fill(stored)
        mapped = stored.map()
    assert mapped[:] == content_of(stored.blob)


def test_handles_of_one_blob_share_and_count(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        first, second = store.open_blob(make_blob()), store.find_blob(make_blob())
        assert first is second
        first.close()
        put(first, 0)
        first.close()
        first.close()
        with pytest.raises(StoreError, match="was closed"):
            first.state(0)
        with store.open_blob(make_blob()) as again:
            assert again is not first
            assert again.state(0) == FILLED


def test_a_blob_is_found_only_when_it_is_there(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert store.find_blob(make_blob()) is None
        store.open_blob(make_blob()).close()
        found = store.find_blob(make_blob())
        assert found is not None
        found.close()
        assert store.find_blob(make_blob(version="v2")) is None
        assert store.find_blob(make_blob(version="")) is None


def test_a_blob_without_a_version_is_never_stored(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, pytest.raises(StoreError, match="no version"):
        store.open_blob(make_blob(version=""))


def test_an_existing_blob_keeps_its_chunk_size(tmp_path: Path) -> None:
    store_blob(tmp_path, make_blob())
    with (
        open_store(tmp_path, chunk_size=2 * CHUNK) as store,
        store.open_blob(make_blob()) as stored,
    ):
        assert stored.chunk_size == CHUNK
        assert stored.complete


@pytest.mark.parametrize("length", [1, 3839, 3840, 3841, 9000])
def test_uris_of_any_length_work(tmp_path: Path, length: int) -> None:
    blob = Blob("s3://b/" + "ä/" * length, 2 * CHUNK, "v" * length)
    data = store_blob(tmp_path, blob)
    assert data.read_bytes() == content_of(blob)
    with open_store(tmp_path) as store:
        assert [info.blob for info in store.blobs()] == [blob]


def test_an_empty_blob_is_complete(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(Blob("s3://b/empty", 0, "v")) as stored:
        stored.sync()
        assert (stored.n_chunks, stored.complete, stored.present_bytes()) == (0, True, 0)
        assert stored.verify(everything=True) == 0
        with pytest.raises(StoreError):
            stored.map()


def test_a_blob_of_100_000_chunks_opens_and_counts(tmp_path: Path) -> None:
    blob = Blob("s3://b/huge", 100_000 * CHUNK - 5, "v")
    with open_store(tmp_path) as store, store.open_blob(blob) as stored:
        put(stored, 7, 99_999)
    with open_store(tmp_path) as store, store.open_blob(blob) as stored:
        assert stored.n_chunks == 100_000
        assert stored.present_bytes() == 2 * CHUNK - 5
        assert read_chunk(stored, 99_999) == piece_of(stored, 99_999)
        assert store.usage_bytes() < 100_000 * 64 + 3 * CHUNK


@given(states=st.binary(max_size=40), chunk_size=st.integers(1, 100), data=st.data())
def test_present_bytes_is_the_sum_over_chunks(
    states: bytes, chunk_size: int, data: st.DataObject
) -> None:
    top = len(states) * chunk_size
    size = data.draw(st.integers(max(0, top - chunk_size + 1), top))
    present = (
        min(chunk_size, size - i * chunk_size)
        for i, state in enumerate(states)
        if state in (FILLED, DURABLE)
    )
    assert present_bytes(states, chunk_size, size) == sum(present)


def test_the_chunk_lock_excludes_threads_and_other_stores(tmp_path: Path) -> None:
    with (
        open_store(tmp_path) as ours,
        open_store(tmp_path) as theirs,
        ours.open_blob(make_blob()) as mine,
        theirs.open_blob(make_blob()) as other,
    ):
        assert mine.try_lock(3)
        assert not mine.try_lock(3)
        assert not other.try_lock(3)
        assert other.try_lock(2)
        mine.unlock(3)
        assert other.try_lock(3)
        other.unlock(3)
        other.unlock(3)
        assert mine.try_lock(3)


def test_states_travel_between_stores_at_once(tmp_path: Path) -> None:
    with (
        open_store(tmp_path) as ours,
        open_store(tmp_path) as theirs,
        ours.open_blob(make_blob()) as mine,
        theirs.open_blob(make_blob()) as other,
    ):
        put(mine, 0, 1)
        assert read_chunk(other, 0) == piece_of(mine, 0)
        put(other, 2, 3, 4)
        other.sync()
        assert mine.complete
        assert other.complete


def test_close_frees_descriptors_and_locks(tmp_path: Path) -> None:
    with open_store(tmp_path) as ours, open_store(tmp_path) as theirs:
        before = len(os.listdir("/proc/self/fd"))
        stored = ours.open_blob(make_blob())
        put(stored, 0)
        assert stored.try_lock(1)
        stored.close()
        assert len(os.listdir("/proc/self/fd")) == before
        with theirs.open_blob(make_blob()) as other:
            assert other.try_lock(1)


def test_drop_forgets_a_chunk_and_unseals(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        fill(stored)
        stored.drop(2)
        stored.drop(2)
        assert (stored.state(2), stored.complete) == (EMPTY, False)
        assert store.stats().dropped_chunks == 1
        fill(stored)
        assert stored.map()[:] == content_of(stored.blob)


def test_reads_on_a_closed_blob_are_errors_not_bytes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    stored = store.open_blob(make_blob())
    fill(stored)
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        read_chunk(stored, 0)


def test_suspect_chunks_may_be_overwritten(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        put(stored, 0)
        chunks = stored._open()
        chunks.table.set_state(0, SUSPECT)
        put(stored, 0)
        assert stored.state(0) == FILLED


def test_a_hint_that_the_file_system_refuses_is_no_error() -> None:
    reading, writing = os.pipe()
    try:
        read_ahead(reading)
    finally:
        os.close(reading)
        os.close(writing)
