"""Bytes that changed behind the store's back: never served, always replaced."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.cachefs.store.blobs import (
    CHUNK,
    content_of,
    fill,
    flip,
    make_blob,
    open_store,
    piece_of,
    put,
    read_chunk,
    store_blob,
    table_of,
)
from tests.conftest import LogWatch

from weightstream.cachefs.store import ChunkState

EMPTY, FILLED, DURABLE, SUSPECT = ChunkState
CHANGED = "was changed by somebody"
MISMATCH = "does not match its hash"


def test_a_flipped_bit_in_a_sealed_blob_is_found_at_opening(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log(CHANGED)
    expect_log(r"bytes 65536-131071 does not match its hash: dropped")
    flip(store_blob(tmp_path, make_blob()), CHUNK + 5)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.states() == bytes([SUSPECT] * 5)
        assert not stored.complete
        assert stored.verify() == 1
        assert stored.states() == bytes([DURABLE, EMPTY, DURABLE, DURABLE, DURABLE])
        assert (store.stats().touched_blobs, store.stats().dropped_chunks) == (1, 1)
        fill(stored)
        assert stored.map()[:] == content_of(stored.blob)


def test_touching_a_sealed_file_costs_a_hash_and_nothing_else(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log(CHANGED)
    os.utime(store_blob(tmp_path, make_blob()))
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert read_chunk(stored, 1) == piece_of(stored, 1)
        assert stored.state(1) == FILLED
        assert stored.verify() == 0
        assert stored.map()[:] == content_of(stored.blob)


def test_a_flipped_bit_in_a_partial_blob_is_found_when_it_is_read(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log(MISMATCH)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        put(stored, 0, 1)
        stored.sync()
        path = stored.data_path
    flip(path, 5)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        part = memoryview(bytearray(10))
        assert not stored.read_into(0, 100, part)
        assert stored.state(0) == EMPTY
        assert stored.read_into(1, 100, part)
        assert part == piece_of(stored, 1)[100:110]


def test_what_an_earlier_process_left_is_hashed_before_it_is_sealed(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log(MISMATCH)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        put(stored, 0, 1)
        stored.sync()
        path = stored.data_path
    flip(path, 5)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        put(stored, 2, 3, 4)
        stored.sync()
        assert not stored.complete
        fill(stored)
        assert stored.map()[:] == content_of(stored.blob)


def test_a_change_under_an_open_blob_is_not_sealed_by_a_later_refetch(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log(MISMATCH)
    path = store_blob(tmp_path, make_blob())
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        flip(path, CHUNK)
        stored.drop(3)
        put(stored, 3)
        stored.sync()
        assert not stored.complete
        assert stored.verify() == 1
        fill(stored)
        assert stored.map()[:] == content_of(stored.blob)


def test_a_bit_that_the_disk_flipped_silently_is_found_by_verify_everything(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log(MISMATCH)
    flip(store_blob(tmp_path, make_blob()), 4 * CHUNK + 1, touch=False)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.complete
        seen: list[int] = []
        assert stored.verify(everything=True, progress=seen.append) == 1
        assert seen == [CHUNK] * 4 + [777]
        assert not stored.complete


@pytest.mark.parametrize("size", [0, 1, CHUNK + 1, 4 * CHUNK + 776, 4 * CHUNK + 778])
def test_a_data_file_of_another_size_loses_what_is_cut_off(
    tmp_path: Path, expect_log: LogWatch, size: int
) -> None:
    expect_log(CHANGED)
    if size < make_blob().size:
        expect_log(MISMATCH)
    os.truncate(store_blob(tmp_path, make_blob()), size)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        stored.verify()
        kept = [read_chunk(stored, i) for i in range(5)]
        whole = min(size // CHUNK, 4) + (size >= stored.blob.size)
        assert kept[:whole] == [piece_of(stored, i) for i in range(whole)]
        assert kept[whole:] == [None] * (5 - whole)
        fill(stored)
        assert stored.map()[:] == content_of(stored.blob)


def test_a_truncation_under_an_open_blob_reads_as_false(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log("the file ends before")
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        put(stored, *range(5))
        os.truncate(stored.data_path, 2 * CHUNK)
        assert read_chunk(stored, 1) == piece_of(stored, 1)
        assert read_chunk(stored, 3) is None
        assert stored.state(3) == EMPTY


def test_a_missing_data_file_starts_the_blob_over(tmp_path: Path, expect_log: LogWatch) -> None:
    expect_log("starting s3://bucket/model/a over.*is missing")
    store_blob(tmp_path, make_blob()).unlink()
    with open_store(tmp_path) as store:
        assert store.find_blob(make_blob()) is None
        with store.open_blob(make_blob()) as stored:
            assert stored.states() == bytes(5)
            fill(stored)
            assert stored.map()[:] == content_of(stored.blob)
        assert store.stats().rebuilt_tables == 1


@pytest.mark.parametrize("length", [0, 100, 4096, 4096 + 64 * 4, 4096 + 64 * 6])
def test_a_table_of_the_wrong_length_starts_the_blob_over(
    tmp_path: Path, expect_log: LogWatch, length: int
) -> None:
    expect_log("starting s3://bucket/model/a over")
    os.truncate(table_of(store_blob(tmp_path, make_blob())), length)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.states() == bytes(5)


def test_a_table_of_another_blob_is_not_believed(tmp_path: Path, expect_log: LogWatch) -> None:
    expect_log("the table of s3://bucket/model/a is of s3://bucket/model/b")
    ours, theirs = store_blob(tmp_path, make_blob()), store_blob(tmp_path, make_blob(name="b"))
    shutil.copy(table_of(theirs), table_of(ours))
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.states() == bytes(5)


def test_a_torn_entry_is_not_believed(tmp_path: Path, expect_log: LogWatch) -> None:
    expect_log(MISMATCH)
    path = store_blob(tmp_path, make_blob())
    flip(table_of(path), 4096 + 2 * 64 + 30)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.verify(everything=True) == 1
        assert stored.state(2) == EMPTY


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    what=st.sampled_from(["data", "table"]),
    at=st.integers(0, 4 * CHUNK + 776),
    mask=st.integers(1, 255),
    whole=st.booleans(),
)
def test_no_flipped_byte_is_ever_served(
    tmp_path_factory: pytest.TempPathFactory,
    expect_log: LogWatch,
    what: str,
    at: int,
    mask: int,
    whole: bool,
) -> None:
    root = tmp_path_factory.mktemp("flip")
    blob = make_blob()
    with open_store(root) as store, store.open_blob(blob) as stored:
        put(stored, *range(5 if whole else 3))
        stored.sync()
        path = stored.data_path
    victim = path if what == "data" else table_of(path)
    flip(victim, at % victim.stat().st_size, mask)
    with open_store(root) as store, store.open_blob(blob) as stored:
        for i in range(5):
            assert read_chunk(stored, i) in (None, piece_of(stored, i))
        stored.verify()
        put(stored, *(i for i in range(5) if stored.state(i) == EMPTY))
        stored.sync()
        assert stored.map()[:] == content_of(blob)
    shutil.rmtree(root)
    expect_log.records.clear()  # which warnings come depends on the byte
