"""Stores that are damaged, full, read-only, small, shared or huge behind a mount (R11-R17)."""

import mmap
import os
import shutil
import subprocess
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from tests.kit import faults as f
from tests.kit.disks import small_disk
from tests.kit.models import random_bytes
from tests.mount.conftest import Bucket, errno_of, until

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store import Store
from weightstream.cachefs.store.stored import StoredBlob
from weightstream.cachefs.store.table import Entry

pytestmark = pytest.mark.fuse
MIB = 1 << 20


def stored(bucket: Bucket, store: Store, name: str) -> StoredBlob:
    (info,) = [info for info in store.blobs() if info.blob.uri == f"{bucket.uri}/{name}"]
    return store.open_blob(info.blob)


def data_path(bucket: Bucket, name: str) -> Path:
    with Store.open(bucket.settings) as store, stored(bucket, store, name) as blob:
        return blob.data_path


@pytest.mark.parametrize("damage", ["flip", "truncate", "swap", "zeros"])
def test_r11_damage_on_the_disk_is_found_and_fetched_again(bucket: Bucket, damage: str) -> None:
    files = {"a.bin": random_bytes(4 * MIB, "r11a"), "b.bin": random_bytes(4 * MIB, "r11b")}
    bucket.put_files(files)
    mounted = bucket.mount()
    for name, data in files.items():
        assert (mounted.path / name).read_bytes() == data
    assert mounted.complete(*files)
    assert mounted.umount().returncode == 0
    first, second = data_path(bucket, "a.bin"), data_path(bucket, "b.bin")
    if damage == "swap":
        spare = first.with_suffix(".spare")
        first.rename(spare)
        second.rename(first)
        spare.rename(second)
    elif damage == "truncate":
        os.truncate(first, MIB + 7)
    else:
        with first.open("r+b") as file:
            file.seek(2 * MIB)
            file.write(bytes(5000) if damage == "zeros" else b"\xff" * 5000)
    again = bucket.mount()
    for name, data in files.items():
        assert (again.path / name).read_bytes() == data


def test_r11_bytes_damaged_on_the_way_never_complete_a_file(bucket: Bucket) -> None:
    """The origin keeps a checksum of the whole object: a flipped bit on the wire is found."""
    from base64 import b64encode

    from awscrt import checksums

    data = bucket.put("w.bin", random_bytes(4 * MIB, "wire"))
    digest = b64encode(checksums.crc64nvme(data).to_bytes(8, "big")).decode()
    path = f"/models/{bucket.prefix}/w.bin"
    bucket.proxy.checksums[path] = ("x-amz-checksum-crc64nvme", digest)
    every = f.When(key="w.bin", ranged=True, covers=3 * MIB, times=None)
    bucket.proxy.add(every, f.Corrupt(3 * MIB))
    mounted = bucket.mount()
    (mounted.path / "w.bin").read_bytes()
    assert until(lambda: not mounted.gauges()["fills"])
    with Store.open(bucket.settings) as store, stored(bucket, store, "w.bin") as blob:
        assert not blob.complete


@pytest.mark.parametrize("what", ["table gone", "table garbage", "data gone", "left-overs"])
def test_r12_a_broken_store_is_mended(bucket: Bucket, what: str) -> None:
    data = bucket.put("w.bin", random_bytes(4 * MIB, "r12"))
    mounted = bucket.mount()
    assert (mounted.path / "w.bin").read_bytes() == data
    assert mounted.complete("w.bin")
    assert mounted.umount().returncode == 0
    path = data_path(bucket, "w.bin")
    if what == "table gone":
        path.with_suffix(".table").unlink()
    elif what == "table garbage":
        path.with_suffix(".table").write_bytes(os.urandom(8192))
    elif what == "data gone":
        path.unlink()
    else:
        path.with_suffix(".table.tmp").write_bytes(b"half a table")
        for folder in bucket.settings.store.iterdir():
            if folder.is_dir() and folder.name not in ("blobs",):
                (folder / "x.json").write_bytes(b"{not json")
                for one in folder.glob("*.json"):
                    one.write_bytes(b"\0" * 100)
    again = bucket.mount()
    assert (again.path / "w.bin").read_bytes() == data
    assert again.complete("w.bin")


def test_r14_a_full_disk_costs_the_copy_and_no_byte(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(24 * MIB, "r14"))
    with small_disk(bucket.root / "disk", 12 * MIB, "tmpfs") as disk:
        bucket.options["store"] = disk.path / "store"
        mounted = bucket.mount()
        assert (mounted.path / "w.bin").read_bytes() == data
        disk.fill()
        subprocess.run(["sh", "-c", "echo 1 > /proc/sys/vm/drop_caches"], check=True)
        assert (mounted.path / "w.bin").read_bytes() == data
        assert mounted.umount().returncode == 0


def test_r14_a_store_that_turns_read_only_is_read_on(bucket: Bucket) -> None:
    old = bucket.put("old.bin", random_bytes(2 * MIB, "old"))
    with small_disk(bucket.root / "disk", 64 * MIB, "ext4") as disk:
        bucket.options["store"] = disk.path / "store"
        mounted = bucket.mount()
        assert (mounted.path / "old.bin").read_bytes() == old
        assert mounted.complete("old.bin")
        assert mounted.umount().returncode == 0
        disk.set_read_only(True)
        new = bucket.put("new.bin", random_bytes(2 * MIB, "new"))
        again = bucket.mount()
        assert (again.path / "old.bin").read_bytes() == old
        assert (again.path / "new.bin").read_bytes() == new
        assert again.umount().returncode == 0


def test_r15_eviction_takes_nothing_from_under_a_reader(bucket: Bucket) -> None:
    """The store holds two of five files; all are read again and again, one stays mapped."""
    files = {f"e{i}.bin": random_bytes(6 * MIB, f"r15-{i}") for i in range(5)}
    bucket.put_files(files)
    bucket.options["store_max_bytes"] = 14 * MIB
    mounted = bucket.mount()
    kept = "e0.bin"
    assert (mounted.path / kept).read_bytes() == files[kept]
    assert mounted.complete(kept)
    with (mounted.path / kept).open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for _ in range(2):
            for name, data in files.items():
                assert (mounted.path / name).read_bytes() == data
        assert view[:] == files[kept]
        view.close()


def test_r15_a_store_smaller_than_the_file_serves_it(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(24 * MIB, "small"))
    bucket.options["store_max_bytes"] = 4 * MIB
    mounted = bucket.mount()
    assert (mounted.path / "w.bin").read_bytes() == data
    assert mounted.state("w.bin") != "complete"


def test_a_file_that_is_evicted_between_looking_and_opening_is_fetched(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(3 * MIB, "evicted"))
    mounted = bucket.mount()
    assert (mounted.path / "w.bin").read_bytes() == data
    assert mounted.complete("w.bin")
    assert (mounted.path / "w.bin").read_bytes() == data  # through the backing file now

    def evicted() -> bool:
        outcome = bucket.cli("evict", bucket.uri)
        with Store.open(bucket.settings) as store:
            return outcome.returncode == 0 and not list(store.blobs())

    assert until(evicted)
    assert (mounted.path / "w.bin").read_bytes() == data


def test_r16_two_mounts_fill_one_file_of_one_store(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(24 * MIB, "r16"))
    mounts = [bucket.mount(), bucket.mount()]
    got: list[bytes] = []
    threads = [
        threading.Thread(target=lambda m=m: got.append((m.path / "w.bin").read_bytes()))
        for m in mounts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [data, data]
    assert all(m.complete("w.bin") for m in mounts)
    assert bucket.sent("w.bin") <= 1.3 * len(data)


def test_r17_a_million_stored_chunks_do_not_delay_a_mount(bucket: Bucket) -> None:
    bucket.put("w.bin", b"here")
    settings = bucket.settings
    chunk, each = 64 << 10, 100_000
    from weightstream.settings import Settings

    small = Settings(store=settings.store, chunk_size=chunk, store_min_free_bytes=0)
    with Store.open(small) as store:
        for i in range(10):
            blob = Blob(f"s3://models/elsewhere/{i}.bin", each * chunk, "v1")
            with store.open_blob(blob) as big:
                table = big._open().table  # the states alone: the bytes would be 64 GB
                table.replace_states(b"\x02" * each)
                table.put(0, Entry(bytes(32), 0))
    bucket.mount()  # warm: imports, page cache
    begun_s = time.monotonic()
    mounted = bucket.mount()
    took_s = time.monotonic() - begun_s
    assert (mounted.path / "w.bin").read_bytes() == b"here"
    assert took_s < 20  # wanted: 2, interpreter and imports included


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "overlay"])
def test_r26_stores_on_any_file_system_serve_the_same(bucket: Bucket, kind: str) -> None:
    data = bucket.put("w.bin", random_bytes(5 * MIB, f"r26-{kind}"))
    where = bucket.root / "fs"
    if kind == "overlay":
        with small_disk(bucket.root / "disk", 64 * MIB, "ext4") as disk:
            for name in ("lower", "upper", "work"):
                (disk.path / name).mkdir()
            where.mkdir()
            layers = (
                f"lowerdir={disk.path}/lower,upperdir={disk.path}/upper,workdir={disk.path}/work"
            )
            done = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(where)])
            if done.returncode:
                pytest.skip("no overlayfs here")
            try:
                _serves(bucket, where, data)
            finally:
                subprocess.run(["umount", "--lazy", str(where)], check=False)
    else:
        with small_disk(where, 64 * MIB, kind):
            _serves(bucket, where, data)


def _serves(bucket: Bucket, where: Path, data: bytes) -> None:
    bucket.options["store"] = where / "store"
    mounted = bucket.mount()
    assert (mounted.path / "w.bin").read_bytes() == data
    assert mounted.complete("w.bin")
    with (mounted.path / "w.bin").open("rb") as file:
        assert file.read() == data
        assert mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:] == data
    assert mounted.umount().returncode == 0
    shutil.rmtree(where / "store", ignore_errors=True)


def test_r27_the_store_cannot_be_written_through_the_mount(bucket: Bucket) -> None:
    import errno

    data = bucket.put("w.bin", random_bytes(3 * MIB, "r27"))
    mounted = bucket.mount()
    path = mounted.path / "w.bin"
    assert path.read_bytes() == data
    assert mounted.complete("w.bin")
    refused = (errno.EROFS, errno.EACCES, errno.EPERM)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND):
        assert errno_of(partial(os.open, path, flags)) in refused
    new = mounted.path / "new"
    for call in (
        lambda: os.open(new, os.O_CREAT | os.O_WRONLY),
        lambda: os.mkdir(new),
        lambda: os.unlink(path),
        lambda: os.rename(path, new),
        lambda: os.link(path, new),
        lambda: os.symlink("w.bin", new),
        lambda: os.mkfifo(new),
        lambda: os.chmod(path, 0o777),
        lambda: os.chown(path, 1, 1),
        lambda: os.truncate(path, 0),
        lambda: os.utime(path),
        lambda: os.setxattr(path, "user.x", b"y"),
        lambda: os.removexattr(path, "user.weightstream.uri"),
        lambda: os.rmdir(mounted.path),
    ):
        assert errno_of(call) in (*refused, errno.ENOTSUP, errno.EBUSY)
    with path.open("rb") as file:
        assert errno_of(lambda: os.write(file.fileno(), b"x")) == errno.EBADF
        with pytest.raises(PermissionError):
            mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_WRITE)
        private = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        private[:5] = b"mine!"
        private.close()
    assert path.read_bytes() == data
    assert data_path(bucket, "w.bin").read_bytes() == data
