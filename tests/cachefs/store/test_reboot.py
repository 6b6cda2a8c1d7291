"""What a restart of the machine leaves: another boot id, and FILLED chunks that may be anything."""

from pathlib import Path

from tests.cachefs.store.blobs import (
    CHUNK,
    content_of,
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
from weightstream.cachefs.store.files import OpenFile
from weightstream.cachefs.store.recovery import current_boot_id
from weightstream.cachefs.store.table import Table

EMPTY, FILLED, DURABLE, SUSPECT = ChunkState


def partly_stored(root: Path) -> Path:
    """Leave two durable chunks and two that are only filled."""
    with open_store(root) as store, store.open_blob(make_blob()) as stored:
        put(stored, 0, 1)
        stored.sync()
        put(stored, 2, 3)
        return stored.data_path


def reboot(data: Path, check: bool = True) -> None:
    """Make the table look as if it had been used on another boot."""
    with table_of(data).open("r+b") as file:
        table = Table(OpenFile(Path(file.name), 2), shared=True)
        assert not check or table.boot_id == current_boot_id()
        table.boot_id = bytes(range(16))


def test_filled_chunks_are_suspect_after_a_reboot_and_durable_ones_are_not(tmp_path: Path) -> None:
    reboot(partly_stored(tmp_path))
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.states() == bytes([DURABLE, DURABLE, SUSPECT, SUSPECT, EMPTY])
        assert stored.present_bytes() == 2 * CHUNK
        assert store.stats().rebooted_blobs == 1


def test_without_a_reboot_filled_chunks_stay(tmp_path: Path) -> None:
    partly_stored(tmp_path)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.states() == bytes([DURABLE, DURABLE, FILLED, FILLED, EMPTY])


def test_suspect_chunks_that_survived_are_used_and_others_dropped(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log("does not match its hash")
    data = partly_stored(tmp_path)
    flip(data, 2 * CHUNK)
    reboot(data)
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert read_chunk(stored, 2) is None
        assert read_chunk(stored, 3) == piece_of(stored, 3)
        assert stored.states() == bytes([DURABLE, DURABLE, EMPTY, FILLED, EMPTY])
        put(stored, 2, 4)
        stored.sync()
        assert stored.map()[:] == content_of(stored.blob)


def test_verify_settles_all_doubt(tmp_path: Path) -> None:
    reboot(partly_stored(tmp_path))
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.verify() == 0
        assert stored.states() == bytes([DURABLE] * 4 + [EMPTY])


def test_a_sealed_blob_needs_no_hashing_after_a_reboot(tmp_path: Path) -> None:
    reboot(store_blob(tmp_path, make_blob()))
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.complete


def test_the_second_opener_after_a_reboot_leaves_new_chunks_alone(tmp_path: Path) -> None:
    reboot(partly_stored(tmp_path))
    with open_store(tmp_path) as ours, ours.open_blob(make_blob()) as mine:
        put(mine, 4)
        with open_store(tmp_path) as theirs, theirs.open_blob(make_blob()) as other:
            assert other.state(4) == FILLED


def test_a_table_whose_header_never_reached_the_disk_is_rebuilt(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log("starting s3://bucket/model/a over")
    table = table_of(partly_stored(tmp_path))
    table.write_bytes(bytes(table.stat().st_size))
    with open_store(tmp_path) as store, store.open_blob(make_blob()) as stored:
        assert stored.states() == bytes(5)
