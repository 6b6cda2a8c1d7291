"""Disks that are full or cannot be written: clear errors, and what is there stays readable."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
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
from tests.conftest import LogWatch
from tests.kit.processes import run_python

from weightstream.cachefs.blob import Blob
from weightstream.errors import StoreError, StoreFullError, StoreReadOnlyError

SIZE = 4 << 20
NOBODY = 65534

AS_NOBODY = f"""
import os, sys
from pathlib import Path
from tests.cachefs.store.blobs import *
from weightstream.errors import WeightstreamError
os.setgid({NOBODY})  # after the imports: nobody may not read the interpreter's home everywhere
os.setuid({NOBODY})
def attempt(work):
    try:
        return work()
    except WeightstreamError as error:
        return type(error).__name__
root = Path(sys.argv[1])
"""

READ_ONLY = (
    AS_NOBODY
    + """
with open_store(root) as store:
    emit(store.writable)
    with store.open_blob(make_blob()) as stored:
        emit([stored.writable, stored.complete, stored.map()[:] == content_of(stored.blob)])
        emit(read_chunk(stored, 1) == piece_of(stored, 1))
        emit(attempt(lambda: stored.try_lock(0)))
        emit(attempt(lambda: put(stored, 0)))
    emit(attempt(lambda: store.open_blob(make_blob(name="new"))))
    emit([attempt(f) for f in (store.evict, store.scrub, lambda: store.remove(""))])
    emit(attempt(lambda: store.save_listing("s3://b", ())))
    emit(len(list(store.blobs())))
"""
)


def mounted(directory: Path, *command: str) -> Iterator[Path]:
    """Mount something on `directory` for the length of a test."""
    directory.mkdir()
    if os.geteuid() or subprocess.run([*command, directory], capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of a few MiB; ext4 takes O_DIRECT and allocates late, tmpfs does neither."""
    if request.param == "tmpfs":
        yield from mounted(tmp_path / "disk", "mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none")
        return
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4")
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", image], check=True)
    yield from mounted(tmp_path / "disk", "mount", "-o", "loop", str(image))


def test_a_full_disk_is_an_error_and_keeps_what_is_there(small_disk: Path) -> None:
    blob = make_blob(chunks=100)
    with open_store(small_disk) as store, store.open_blob(blob) as stored:
        with pytest.raises(StoreFullError, match=r"cannot write s3://bucket/model/a bytes .*space"):
            put(stored, *range(101))
        full = stored.present_bytes() // CHUNK
        assert 10 < full < 70
        stored.sync()
        assert not stored.complete
        assert read_chunk(stored, full) is None
        assert all(read_chunk(stored, i) == piece_of(stored, i) for i in range(full))
        with pytest.raises(StoreFullError):
            put(stored, full)


def test_a_table_that_does_not_fit_is_an_error_not_a_bus_error(small_disk: Path) -> None:
    blob = Blob("s3://bucket/huge", 1_000_000 * CHUNK, "v")
    with open_store(small_disk) as store:
        with pytest.raises(StoreFullError):
            store.open_blob(blob)
        assert list(store._layout.files()) == []
        with store.open_blob(make_blob()) as stored:
            fill(stored)
            assert stored.complete


@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 1, 1 << 63, 1 << 200])
def test_a_blob_larger_than_any_file_is_an_error(tmp_path: Path, size: int) -> None:
    with open_store(tmp_path, chunk_size=64 << 20) as store:
        with pytest.raises(StoreError, match="cannot make"):
            store.open_blob(Blob("s3://bucket/impossible", size, "v"))
        assert list(store._layout.files()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_another_users_readable_store_serves_reads_only(tmp_path: Path) -> None:
    data = store_blob(tmp_path, make_blob())
    for parent in tmp_path.parents[:-1]:
        if parent.stat().st_mode & 0o005 != 0o005 and "pytest" in parent.name:
            parent.chmod(0o755)
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    outcome = run_python(READ_ONLY, tmp_path, env={"HOME": str(tmp_path)})
    assert outcome.values == (
        False,
        [False, True, True],
        True,
        "StoreReadOnlyError",
        "StoreReadOnlyError",
        "StoreReadOnlyError",
        ["StoreReadOnlyError"] * 3,
        "StoreReadOnlyError",
        1,
    ), outcome.stderr
    assert data.read_bytes() == content_of(make_blob())


@pytest.fixture
def read_only_mount(tmp_path: Path) -> Iterator[Path]:
    """A store with a sealed blob, a partial one and a touched one, mounted read-only."""
    store_blob(tmp_path, make_blob())
    with open_store(tmp_path) as store, store.open_blob(make_blob(name="partial")) as stored:
        put(stored, 0, 1)
    os.utime(store_blob(tmp_path, make_blob(name="touched")))
    yield from mounted(tmp_path / "ro", "mount", "-o", "bind,ro", str(tmp_path))


def test_a_store_on_a_read_only_mount_serves_reads(
    read_only_mount: Path, expect_log: LogWatch
) -> None:
    expect_log("was changed by somebody")
    with open_store(read_only_mount) as store:
        assert not store.writable
        with store.open_blob(make_blob()) as stored:
            assert stored.map()[:] == content_of(stored.blob)
        with store.open_blob(make_blob(name="partial")) as stored:
            assert [read_chunk(stored, i) for i in (0, 2)] == [piece_of(stored, 0), None]
        with store.open_blob(make_blob(name="touched")) as stored:
            assert not stored.complete
            assert stored.verify() == 0
            assert stored.map()[:] == content_of(stored.blob)
        with pytest.raises(StoreReadOnlyError, match="read-only"):
            store.open_blob(make_blob(name="new"))


def test_a_read_only_directory_without_a_store_is_an_error(read_only_mount: Path) -> None:
    with pytest.raises(StoreReadOnlyError):
        open_store(read_only_mount / "nothing")
