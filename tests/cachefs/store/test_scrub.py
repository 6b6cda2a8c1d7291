"""Scrubbing: everything is read, what is wrong goes, what is right stays."""

import os
import time
from pathlib import Path

from tests.cachefs.store.blobs import (
    CHUNK,
    content_of,
    fill,
    flip,
    make_blob,
    open_store,
    put,
    store_blob,
    table_of,
)
from tests.conftest import LogWatch

from weightstream.cachefs.store import BlobInfo, ChunkState


def test_a_sound_store_loses_nothing(tmp_path: Path) -> None:
    store_blob(tmp_path, make_blob())
    with open_store(tmp_path) as store:
        with store.open_blob(make_blob(name="partial")) as stored:
            put(stored, 2)
        report = store.scrub()
        assert (report.blobs, report.dropped_chunks, report.removed_files) == (2, 0, 0)
        assert report.checked_bytes == make_blob().size + CHUNK
        with store.open_blob(make_blob()) as stored:
            assert stored.complete


def test_what_the_disk_changed_silently_is_dropped_and_named(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log("does not match its hash: dropped")
    flip(store_blob(tmp_path, make_blob()), CHUNK, touch=False)
    store_blob(tmp_path, make_blob(name="sound"))
    with open_store(tmp_path) as store:
        report = store.scrub()
        assert report.damaged_blobs == ("s3://bucket/model/a",)
        assert report.dropped_chunks == 1
        with store.open_blob(make_blob()) as stored:
            assert stored.state(1) == ChunkState.EMPTY
            fill(stored)
            assert stored.map()[:] == content_of(stored.blob)


def test_what_belongs_to_no_blob_is_removed(tmp_path: Path, expect_log: LogWatch) -> None:
    expect_log("removing a damaged blob")
    data = store_blob(tmp_path, make_blob())
    orphan = store_blob(tmp_path, make_blob(name="orphan"))
    table_of(orphan).unlink()
    damaged = store_blob(tmp_path, make_blob(name="damaged"))
    flip(table_of(damaged), 20)
    fresh, stale = data.with_suffix(".fresh.tmp"), data.with_suffix(".stale.tmp")
    fresh.touch()
    stale.touch()
    os.utime(stale, (0, time.time() - 7200))
    with open_store(tmp_path) as store:
        assert len(list(store.blobs())) == 1
        assert store.scrub().removed_files == 3
        assert sorted(store._layout.files()) == sorted([data, table_of(data), fresh])


def test_progress_is_told_chunk_by_chunk(tmp_path: Path) -> None:
    store_blob(tmp_path, make_blob())
    calls: list[tuple[str, int]] = []

    def progress(info: BlobInfo, done_bytes: int) -> None:
        calls.append((info.blob.name, done_bytes))

    with open_store(tmp_path) as store:
        store.scrub(progress)
    assert calls == [("a", min(n * CHUNK, make_blob().size)) for n in range(1, 6)]


def test_blobs_in_use_are_scrubbed_too(tmp_path: Path, expect_log: LogWatch) -> None:
    expect_log("does not match its hash")
    data = store_blob(tmp_path, make_blob())
    with (
        open_store(tmp_path) as store,
        open_store(tmp_path) as other,
        other.open_blob(make_blob()) as stored,
    ):
        flip(data, 0, touch=False)
        assert store.scrub().dropped_chunks == 1
        assert not stored.complete
        fill(stored)
        assert stored.complete
