"""Names and attributes through a real mount."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.cachefs.fuse.harness import Mount, errno_of, serving, until

pytestmark = pytest.mark.fuse

FILES = {
    "readme.md": 5,
    "llama/config.json": 700,
    "llama/model.safetensors": 3 << 20,
    "llama/deep/er/x.bin": 4097,
    "empty.bin": 0,
    "names/\u00fc \u4e2d\u6587 'quoted'": 3,
    f"names/{'n' * 255}": 3,
}


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with serving(tmp_path_factory.mktemp("names"), FILES) as mount:
        yield mount


def walked(root: Path) -> set[str]:
    return {
        str(Path(folder, name).relative_to(root))
        for folder, _, names in os.walk(root)
        for name in names
    }


def test_the_tree_is_what_is_listed(mount: Mount) -> None:
    assert walked(mount.path) == set(FILES)
    assert sorted(os.listdir(mount.path)) == ["empty.bin", "llama", "names", "readme.md"]


def test_stat_of_a_file(mount: Mount) -> None:
    found = (mount.path / "llama/model.safetensors").stat()
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o444
    assert (found.st_size, found.st_blocks, found.st_nlink) == (3 << 20, (3 << 20) // 512, 1)
    assert found.st_mtime_ns == found.st_ctime_ns == 1_700_000_000_123_456_789
    assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())


def test_stat_of_a_folder(mount: Mount) -> None:
    for path in (mount.path, mount.path / "llama"):
        found = path.stat()
        assert stat.S_ISDIR(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o555
        assert abs(found.st_mtime - path.parent.stat().st_mtime) < 600
    assert mount.path.stat().st_ino == 1


def test_inode_numbers_of_listing_and_stat_agree(mount: Mount) -> None:
    for folder in (mount.path, mount.path / "llama"):
        with os.scandir(folder) as entries:
            for entry in entries:
                assert entry.inode() == (folder / entry.name).stat().st_ino


def test_statx_tells_the_time_of_birth(mount: Mount) -> None:
    command = ["stat", "--format=%W %s", str(mount.path / "llama/config.json")]
    shown = subprocess.run(command, capture_output=True, check=True, timeout=30)
    assert shown.stdout.split() == [b"1700000000", b"700"]
    assert mount.counts()["statx"]


def test_what_is_not_there(mount: Mount) -> None:
    for name in ("nothing", "llama/nothing", "nothing/at/all"):
        assert errno_of((mount.path / name).stat) == "ENOENT"
    assert errno_of((mount.path / "readme.md/below").stat) == "ENOTDIR"
    assert errno_of((mount.path / ("n" * 255)).stat) == "ENOENT"
    assert errno_of((mount.path / ("\u00fc" * 128)).stat) == "ENAMETOOLONG"
    assert errno_of(lambda: os.readlink(mount.path / "readme.md")) == "EINVAL"


def test_extended_attributes(mount: Mount) -> None:
    path = mount.path / "llama/config.json"
    prefix = "user.weightstream."
    assert sorted(os.listxattr(path)) == [prefix + n for n in ("cached", "etag", "state", "uri")]
    values = {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}
    assert values == {
        prefix + "uri": "s3://bucket/models/llama/config.json",
        prefix + "etag": "1",
        prefix + "cached": "0",
        prefix + "state": "absent",
    }
    assert errno_of(lambda: os.getxattr(path, "user.other")) == "ENODATA"
    for name in ("security.selinux", "system.posix_acl_access", "trusted.other"):
        assert errno_of(partial(os.getxattr, path, name)) in ("EOPNOTSUPP", "ENOTSUP")


def test_extended_attributes_of_folders(mount: Mount) -> None:
    name = "user.weightstream.uri"
    assert os.listxattr(mount.path / "llama") == [name]
    assert os.getxattr(mount.path / "llama/deep", name) == b"s3://bucket/models/llama/deep"
    assert os.getxattr(mount.path, name) == b"s3://bucket/models"
    assert errno_of(lambda: os.getxattr(mount.path, "user.weightstream.etag")) == "ENODATA"


def test_numbers_of_the_file_system_are_those_of_the_stores_disk(mount: Mount) -> None:
    shown, disk = os.statvfs(mount.path), os.statvfs(mount.store)
    assert (shown.f_blocks, shown.f_frsize) == (disk.f_blocks, disk.f_frsize)
    assert shown.f_namemax == 255
    assert shown.f_flag & os.ST_RDONLY


def test_access(mount: Mount) -> None:
    file, folder = mount.path / "readme.md", mount.path / "llama"
    assert os.access(file, os.R_OK)
    assert os.access(folder, os.R_OK | os.X_OK)
    assert not os.access(file, os.W_OK)
    assert not os.access(file, os.X_OK)
    assert not os.access(folder, os.W_OK)


def test_everybody_may_read(mount: Mount) -> None:
    code = f"""
import os
root = os.open({str(mount.path)!r}, os.O_PATH)  # what is above it is for its owner alone
os.setuid(12345)
print(os.read(os.open("readme.md", os.O_RDONLY, dir_fd=root), 10))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert shown.stdout.strip() == b"b'readm'", shown.stderr


def test_a_long_folder_is_listed_once(tmp_path: Path) -> None:
    """R: `find` and `ls -lR` within the TTL neither list again nor ask for every name again."""
    files = {f"many/shard-{i:05}.bin": i for i in range(3000)}
    with serving(tmp_path, files) as mount:
        command = ["ls", "-lR", str(mount.path)]
        first = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
        before = mount.counts()
        assert before.get("lookup", 0) <= 3
        assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout == first
        found = subprocess.run(
            ["find", str(mount.path), "-type", "f", "-size", "+0"],
            capture_output=True, check=True, timeout=60,
        )  # fmt: skip
        assert len(found.stdout.splitlines()) == 2999
        after = mount.counts()
        assert mount.call("listings") == ["", "many"]
        for op in ("lookup", "readdir", "readdirplus"):
            assert after.get(op, 0) == before.get(op, 0), op
        # SELinux and ACLs: "not supported" of one file has `ls` ask no other.
        assert after.get("getxattr", 0) - before.get("getxattr", 0) <= 6


def test_changes_are_seen_within_the_ttl_of_the_kernel(tmp_path: Path) -> None:
    """The kernel is told of names that are new, gone or something else."""
    with serving(tmp_path, {"f/a": 1, "f/b": 2, "f/c": 3}) as mount:
        folder = mount.path / "f"
        assert os.listdir(folder) == ["a", "b", "c"]
        assert errno_of((folder / "d").stat) == "ENOENT"
        inode = (folder / "b").stat().st_ino
        mount.call("put", "f/b", 20, "2")
        mount.call("put", "f/d", 4)
        mount.call("remove", "f/a")
        assert mount.call("server.settle", 30)
        assert os.listdir(folder) == ["b", "c", "d"]
        assert (folder / "b").stat().st_size == 20
        assert (folder / "b").stat().st_ino != inode
        assert (folder / "d").stat().st_size == 4
        assert errno_of((folder / "a").stat) == "ENOENT"


def test_without_a_ttl_every_name_is_asked_for_again(tmp_path: Path) -> None:
    with serving(tmp_path, {"f/a": 1}) as mount:
        mount.call("set_ttl", 0)
        assert (mount.path / "f/a").stat().st_size == 1
        lists = len(mount.call("listings"))
        assert (mount.path / "f/a").stat().st_size == 1
        assert len(mount.call("listings")) > lists


def test_a_folder_opened_before_a_change_is_listed_to_its_end(tmp_path: Path) -> None:
    files = {f"f/{i:04}": 1 for i in range(2000)}
    with serving(tmp_path, files) as mount, os.scandir(mount.path / "f") as entries:
        names = [next(entries).name]
        mount.call("remove", "f/0000")
        mount.call("remove", "f/1999")
        mount.call("server.settle", 30)
        names += [entry.name for entry in entries]
        assert len(names) == len(set(names))
        assert set(names) >= {f"{i:04}" for i in range(1, 1999)}
        assert len(os.listdir(mount.path / "f")) == 1998


def test_names_that_the_kernel_forgets_are_forgotten(tmp_path: Path) -> None:
    files = {f"f/{i:04}": 1 for i in range(500)}
    with serving(tmp_path, files) as mount:
        subprocess.run(["ls", "-l", str(mount.path / "f")], capture_output=True, timeout=60)
        assert mount.call("child.nodes") > 500
        for path in list(files):
            mount.call("remove", path)
        assert mount.call("server.settle", 30)
        assert until(lambda: mount.call("child.nodes") < 10)


def test_an_origin_that_fails_is_an_error_and_others_go_on(tmp_path: Path) -> None:
    with serving(tmp_path, {"good/a": 1, "bad/b": 1}) as mount:
        mount.call("fail", "bad")
        assert errno_of(lambda: os.listdir(mount.path / "bad")) == "EIO"
        assert errno_of((mount.path / "bad/b").stat) == "EIO"
        assert os.listdir(mount.path / "good") == ["a"]
        assert "bad: refused" in mount.log()
        assert mount.call("child.errors")["EIO"] == 2


def test_r21_a_folder_that_hangs_stops_nobody_else(tmp_path: Path) -> None:
    """More listings hang than there are threads to list; all else is answered at once."""
    files = {f"hung{i}/a": 1 for i in range(20)} | {"good/a": 5, "known/b": 5}
    with serving(tmp_path, files, deadline_s=600.0) as mount:
        assert os.listdir(mount.path / "good") == ["a"]
        for i in range(20):
            mount.call("hang", f"hung{i}")
        listers = [
            subprocess.Popen(
                ["ls", str(mount.path / f"hung{i % 20}")],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for i in range(40)
        ]
        assert until(lambda: mount.call("server.gauges")["waiting_requests"] == 40)
        assert (mount.path / "good/a").read_bytes() == b"good/"
        assert (mount.path / "good").stat().st_mode
        assert sorted(os.listdir(mount.path))[:2] == ["good", "hung0"]
        for i in range(20):
            mount.call("unhang", f"hung{i}")
        assert [lister.wait(60) for lister in listers] == [0] * 40
        assert mount.call("server.gauges")["waiting_requests"] == 0


def test_r21_a_folder_that_hangs_too_long_is_an_error(tmp_path: Path) -> None:
    with serving(tmp_path, {"hung/a": 1, "good/a": 1}, deadline_s=1.0) as mount:
        mount.call("hang", "hung")
        assert errno_of(lambda: os.listdir(mount.path / "hung")) == "EIO"
        assert "no answer within 1 s" in mount.log()
        mount.call("unhang", "hung")
        assert until(lambda: errno_of(lambda: os.listdir(mount.path / "hung")) == "")


def test_r22_a_signal_frees_who_waits_for_a_folder(tmp_path: Path) -> None:
    with serving(tmp_path, {"hung/a": 1}, deadline_s=600.0) as mount:
        mount.call("hang", "hung")
        lister = subprocess.Popen(["ls", str(mount.path / "hung")], stderr=subprocess.DEVNULL)
        assert until(lambda: mount.call("server.gauges")["waiting_requests"])
        lister.terminate()
        assert lister.wait(30)
        assert mount.call("server.gauges")["waiting_requests"] == 0
        mount.call("unhang", "hung")
        assert os.listdir(mount.path / "hung") == ["a"]
