"""A real file system whose disk is copied in mid-flight: the copy is what a power loss leaves.

The image file under a mounted ext4 holds exactly what the file system has sent to its disk. Its
caches (data, table, names, inodes) are lost in the copy, as they are when the power goes.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.cachefs.store.blobs import (
    content_of,
    fill,
    make_blob,
    open_store,
    piece_of,
    put,
    read_chunk,
)
from tests.cachefs.store.test_limits import mounted
from tests.cachefs.store.test_reboot import reboot
from tests.conftest import LogWatch

from weightstream.cachefs.store import ChunkState

PowerLoss = Callable[[], Path]
SYNCED, FILLED_ONLY = range(10), range(10, 18)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An ext4 with a journal, in a file."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4")
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)
    return path


@pytest.fixture
def disk(image: Path, tmp_path: Path) -> Iterator[Path]:
    """The file system in use."""
    yield from mounted(tmp_path / "disk", "mount", "-o", "loop", str(image))


@pytest.fixture
def after_power_loss(
    disk: Path, image: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> PowerLoss:
    """Return a function that copies the disk as it is at that moment and mounts the copy."""

    def lose_power() -> Path:
        copy = tmp_path / "copy"
        shutil.copyfile(image, copy)
        mount = mounted(tmp_path / "later", "mount", "-o", "loop", str(copy))
        path = next(mount)
        request.addfinalizer(lambda: next(mount, None))
        for data in (path / "store" / "blobs").rglob("*.data"):
            if data.with_suffix(".table").stat().st_size:
                reboot(data, check=False)
        return path

    return lose_power


@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_what_was_synced_survives_and_what_was_not_is_never_wrong(
    disk: Path, after_power_loss: PowerLoss, direct_io: str, expect_log: LogWatch
) -> None:
    blob = make_blob(chunks=20)
    with open_store(disk, direct_io=direct_io) as store, store.open_blob(blob) as stored:
        put(stored, *SYNCED)
        stored.sync()
        assert all(stored.state(i) == ChunkState.DURABLE for i in SYNCED)
        put(stored, *FILLED_ONLY)
        later = after_power_loss()
    with open_store(later) as store, store.open_blob(blob) as stored:
        assert store.stats().rebuilt_tables == 0
        for i in range(stored.n_chunks):
            found = read_chunk(stored, i)
            assert found == piece_of(stored, i) or (found is None and i not in SYNCED)
        fill(stored)
        assert stored.map()[:] == content_of(blob)
    expect_log.records.clear()  # chunks that were only filled may be dropped, or absent


def test_a_sealed_blob_is_complete_without_being_read(
    disk: Path, after_power_loss: PowerLoss
) -> None:
    blob = make_blob(chunks=20)
    with open_store(disk) as store, store.open_blob(blob) as stored:
        fill(stored)
        later = after_power_loss()
    with open_store(later) as store, store.open_blob(blob) as stored:
        assert stored.complete
        assert stored.map()[:] == content_of(blob)


def test_a_blob_that_was_just_made_may_be_gone_but_is_not_in_the_way(
    disk: Path, after_power_loss: PowerLoss, expect_log: LogWatch
) -> None:
    with open_store(disk) as store, store.open_blob(make_blob()) as stored:
        put(stored, 0)
        later = after_power_loss()
    with open_store(later) as store, store.open_blob(make_blob()) as stored:
        assert read_chunk(stored, 0) in (None, piece_of(stored, 0))
        fill(stored)
        assert stored.complete
    expect_log.records.clear()
