"""The fuse-python driver, mounted for real: same tree, same bytes, and versions that never mix."""

import errno
import hashlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.kit.faults import Stall, When
from tests.kit.processes import SOURCE, run_python, start_python
from tests.mount.conftest import Bucket, Mounted, errno_of, until

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(find_spec("fuse") is None, reason="needs fuse-python"),
    pytest.mark.skipif(shutil.which("fusermount") is None, reason="needs fuse3"),
]

MIB = 1 << 20
OLD, NEW = os.urandom(3 * MIB + 17), os.urandom(4 * MIB + 5)


def mount(bucket: Bucket, **options: object) -> Mounted:
    bucket.options |= options
    return bucket.mount("--driver", "fuse-python")


def replace(bucket: Bucket, mounted: Mounted, name: str, data: bytes) -> None:
    """Put another object under a name, and have the mount look."""
    bucket.put(name, data)
    mounted.refresh()


def test_files_and_folders_read_like_plain_ones(bucket: Bucket) -> None:
    files = {"a.bin": OLD, "deep/er/b.bin": NEW, "empty": b"", "döner & co, \\x": b"names"}
    bucket.put_files(files)
    path = mount(bucket).path
    shown = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    assert shown == sorted(files)
    for name, data in files.items():
        assert (path / name).read_bytes() == data
        assert (path / name).stat().st_size == len(data)
    with (path / "a.bin").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=1) as view:
        assert view[MIB : 2 * MIB] == OLD[MIB : 2 * MIB]
        assert os.pread(file.fileno(), 100, len(OLD) - 50) == OLD[-50:]
    status = (path / "deep").stat()
    assert (status.st_mode & 0o7777, status.st_nlink) == (0o555, 2)
    assert errno_of(lambda: os.listdir(path / "none")) == errno.ENOENT


def _writes(path: Path) -> dict[str, Callable[[], object]]:
    file = path / "a.bin"
    return {
        "create": lambda: (path / "new").write_bytes(b"x"),
        "write": lambda: os.open(file, os.O_WRONLY),
        "read and write": lambda: os.open(file, os.O_RDWR),
        "truncate at open": lambda: os.open(file, os.O_RDONLY | os.O_TRUNC),
        "truncate": lambda: os.truncate(file, 0),
        "unlink": lambda: os.unlink(file),
        "rename": lambda: os.rename(file, path / "b.bin"),
        "rename to a hidden name": lambda: os.rename(file, path / ".fuse_hidden0000000100000001"),
        "link": lambda: os.link(file, path / "b.bin"),
        "symlink": lambda: os.symlink("a.bin", path / "b.bin"),
        "mkdir": lambda: os.mkdir(path / "d"),
        "rmdir": lambda: os.rmdir(path / "folder"),
        "mkfifo": lambda: os.mkfifo(path / "fifo"),
        "chmod": lambda: os.chmod(file, 0o777),
        "chown": lambda: os.chown(file, 1, 1),
        "utime": lambda: os.utime(file),
        "setxattr": lambda: os.setxattr(file, "user.weightstream.state", b"complete"),
        "removexattr": lambda: os.removexattr(file, "user.weightstream.state"),
    }


def test_everything_that_writes_is_refused(bucket: Bucket) -> None:
    bucket.put_files({"a.bin": b"data", "folder/b": b""})
    path = mount(bucket).path
    assert (path / "a.bin").read_bytes() == b"data"
    found = {name: errno_of(call) for name, call in _writes(path).items()}
    assert found == dict.fromkeys(found, errno.EROFS)
    assert not os.access(path / "a.bin", os.W_OK)
    assert not os.access(path / "a.bin", os.X_OK)
    assert (path / "a.bin").read_bytes() == b"data"
    assert sorted(os.listdir(path)) == ["a.bin", "folder"]


def test_attributes_tell_version_and_state(bucket: Bucket) -> None:
    bucket.put("m/a.bin", OLD)
    mounted = mount(bucket)
    file = mounted.path / "m" / "a.bin"
    assert len(os.listxattr(file)) == 4
    assert os.getxattr(file, "user.weightstream.uri").decode() == f"{bucket.uri}/m/a.bin"
    assert os.getxattr(file, "user.weightstream.etag").decode() == hashlib.md5(OLD).hexdigest()
    assert file.read_bytes() == OLD
    assert mounted.complete("m/a.bin")
    assert int(os.getxattr(file, "user.weightstream.cached")) == len(OLD)
    assert os.getxattr(file.parent, "user.weightstream.uri").decode() == f"{bucket.uri}/m"
    assert errno_of(lambda: os.getxattr(file, "user.other")) == errno.ENODATA
    assert errno_of(lambda: os.getxattr(file, "security.selinux")) == errno.EOPNOTSUPP
    assert os.statvfs(file).f_blocks > 0


def test_second_read_fetches_nothing(bucket: Bucket) -> None:
    bucket.put("a.bin", OLD)
    mounted = mount(bucket)
    assert (mounted.path / "a.bin").read_bytes() == OLD
    assert mounted.complete("a.bin")
    assert mounted.umount().returncode == 0
    sent = bucket.sent("a.bin")
    again = mount(bucket)
    assert (again.path / "a.bin").read_bytes() == OLD
    assert bucket.sent("a.bin") == sent <= len(OLD) * 1.05


def test_replaced_while_open_old_handles_keep_old_bytes(bucket: Bucket) -> None:
    """The page cache of the one inode that libfuse has for a path is where versions would mix."""
    bucket.put("m/a.bin", OLD)
    mounted = mount(bucket)
    path = mounted.path / "m" / "a.bin"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=1) as view:
        assert os.pread(file.fileno(), MIB, 0) == OLD[:MIB]  # these pages are cached, others not
        assert mounted.complete("m/a.bin") or file.read()
        replace(bucket, mounted, "m/a.bin", NEW)
        assert until(lambda: path.stat().st_size == len(NEW))
        assert path.read_bytes() == NEW
        with path.open("rb") as other, mmap.mmap(other.fileno(), 0, prot=1) as fresh:
            assert fresh[:] == NEW
            assert os.fstat(other.fileno()).st_ino != os.fstat(file.fileno()).st_ino
            assert view[:] == OLD
        assert os.fstat(file.fileno()).st_size == len(OLD)
        assert os.pread(file.fileno(), len(OLD), 0) == OLD
    assert os.listdir(path.parent) == ["a.bin"]
    assert path.read_bytes() == NEW


def _has_size(path: Path, size: int) -> bool:
    return path.stat().st_size == size


def test_replaced_again_and_again_while_all_are_open(bucket: Bucket) -> None:
    versions = [os.urandom(MIB + n) for n in range(4)]
    bucket.put("a.bin", versions[0])
    mounted = mount(bucket)
    path = mounted.path / "a.bin"
    held = []
    try:
        for data in versions:
            replace(bucket, mounted, "a.bin", data)
            assert until(partial(_has_size, path, len(data)))
            held.append(path.open("rb"))
            assert held[-1].read() == data
        assert [os.pread(f.fileno(), 2 * MIB, 0) for f in held] == versions
    finally:
        for file in held:
            file.close()
    assert until(lambda: mounted.gauges()["open_files"] == 0)
    assert path.read_bytes() == versions[-1]


def test_replaced_while_open_missing_bytes_are_stale(bucket: Bucket) -> None:
    old = os.urandom(12 * MIB)  # far more than is fetched ahead of one read
    bucket.put("a.bin", old)
    mounted = mount(bucket, fill="off", write_back="off")
    path = mounted.path / "a.bin"
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        assert os.pread(file.fileno(), 4096, 0) == old[:4096]
        replace(bucket, mounted, "a.bin", NEW)
        assert until(lambda: path.stat().st_size == len(NEW))
        assert path.read_bytes() == NEW
        code = errno_of(lambda: os.pread(file.fileno(), 4096, 11 * MIB))
        assert code == errno.ESTALE
        assert os.pread(file.fileno(), 4096, 0) == old[:4096]


def test_replaced_while_closed_has_no_old_pages(bucket: Bucket) -> None:
    same_size = os.urandom(len(OLD))
    bucket.put("a.bin", OLD)
    mounted = mount(bucket)
    path = mounted.path / "a.bin"
    assert path.read_bytes() == OLD
    inode = path.stat().st_ino
    replace(bucket, mounted, "a.bin", same_size)
    assert until(lambda: path.stat().st_ino != inode)
    assert path.read_bytes() == same_size


def test_deleted_while_open(bucket: Bucket) -> None:
    bucket.put_files({"a.bin": OLD, "b.bin": b"stays"})
    mounted = mount(bucket)
    path = mounted.path / "a.bin"
    with path.open("rb") as file:
        assert file.read() == OLD
        bucket.s3.delete(f"models/{bucket.prefix}/a.bin")
        mounted.refresh()
        assert until(lambda: errno_of(path.stat) == errno.ENOENT)
        assert os.pread(file.fileno(), len(OLD), 0) == OLD
        bucket.put("a.bin", NEW)
        mounted.refresh()
        assert until(path.exists)
        assert path.read_bytes() == NEW
        assert os.pread(file.fileno(), len(OLD), 0) == OLD
    assert os.listdir(mounted.path) == ["a.bin", "b.bin"]


_FAULT = """
import mmap, threading
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
gate, right = threading.Barrier(64), []
def fault(number):
    gate.wait()
    stripe = len(view) // 64 + 1
    right.append(sum(view[number * stripe : (number + 1) * stripe]))
threads = [threading.Thread(target=fault, args=(n,)) for n in range(64)]
[t.start() for t in threads]
[t.join() for t in threads]
emit(sum(right))
"""


def test_64_threads_fault_at_once(bucket: Bucket) -> None:
    data = os.urandom(16 * MIB)
    bucket.put("a.bin", data)
    mounted = mount(bucket)
    assert run_python(_FAULT, mounted.path / "a.bin", timeout_s=100).value == sum(data)
    assert bucket.sent("a.bin") <= len(data) * 1.05


def test_dead_server_is_replaced(bucket: Bucket) -> None:
    bucket.put("a.bin", OLD)
    mounted = mount(bucket)
    assert (mounted.path / "a.bin").read_bytes() == OLD
    mounted.kill_server()
    assert until(lambda: errno_of((mounted.path / "a.bin").stat) == 0)
    assert (mounted.path / "a.bin").read_bytes() == OLD
    assert mounted.info()["restarts"] == 1
    assert mounted.umount().returncode == 0
    assert not mounted.is_mounted()


_BLOCKED = """
import mmap, os
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)  # in the page cache only SIGKILL is heard
emit("go")
os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
"""


def test_signal_frees_a_blocked_reader(bucket: Bucket) -> None:
    bucket.put("a.bin", OLD)
    mounted = mount(bucket, deadline_s=40.0, stall_timeout_s=40.0, hedge="off")
    bucket.proxy.add(When(key="a.bin", ranged=True, times=None), Stall(300.0))
    with start_python(_BLOCKED, mounted.path / "a.bin", env=bucket.env) as reader:
        reader.wait_for(lambda: bool(reader.values()))
        assert until(lambda: mounted.gauges()["parked_reads"])
        os.kill(reader.pid, signal.SIGINT)
        assert reader.result(30).returncode != 0
    assert until(lambda: not mounted.gauges()["parked_reads"])


def test_origin_that_is_away_is_an_error_and_no_hang(bucket: Bucket) -> None:
    bucket.put("a.bin", OLD)
    mounted = mount(bucket, deadline_s=2.0)
    path = mounted.path / "a.bin"
    assert path.stat().st_size == len(OLD)
    bucket.s3.pause()
    try:
        assert errno_of(lambda: path.read_bytes()) == errno.EIO
    finally:
        bucket.s3.resume()
    assert until(lambda: errno_of(lambda: path.read_bytes()) == 0)
    assert path.read_bytes() == OLD


@pytest.fixture
def _device_for_everybody() -> Iterator[None]:
    """Give /dev/fuse the mode that udev gives it everywhere, where there is no udev."""
    mode = os.stat("/dev/fuse").st_mode
    os.chmod("/dev/fuse", 0o666)
    yield
    os.chmod("/dev/fuse", mode)


@pytest.fixture
def nobodys(tmp_path: Path) -> Iterator[Path]:
    """A directory of an ordinary user, where he can reach it."""
    folder = Path(tempfile.mkdtemp(prefix="ws-nobody-", dir="/tmp"))
    for path in (folder, folder / "mnt", folder / "run"):
        path.mkdir(exist_ok=True)
        os.chown(path, 65534, 65534)
    yield folder
    subprocess.run(["umount", "--lazy", folder / "mnt"], capture_output=True, timeout=30)
    shutil.rmtree(folder, ignore_errors=True)


def _pythons() -> list[str]:
    """Return interpreters of this very version; an ordinary user may not be able to reach ours."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return [sys.executable, *filter(None, [shutil.which(name, path="/usr/bin:/usr/local/bin")])]


_CHILD = "import subprocess, sys, weightstream; subprocess.check_call([sys.executable, '-c', ''])"


@pytest.mark.usefixtures("_device_for_everybody")
def test_ordinary_user_mounts_through_fusermount(bucket: Bucket, nobodys: Path) -> None:
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
    bucket.put("a.bin", OLD)
    bucket.options |= {"store": nobodys / "store", "run_directory": nobodys / "run"}
    packages = os.pathsep.join([str(SOURCE), sysconfig.get_path("platlib")])
    env = bucket.env | {"PATH": os.environ["PATH"], "HOME": str(nobodys), "PYTHONPATH": packages}

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        line = [*prefix, *map(str, command)]
        return subprocess.run(
            line, env=env, capture_output=True, text=True, timeout=100, cwd=nobodys
        )

    python = next((p for p in _pythons() if run(p, "-c", _CHILD).returncode == 0), None)
    if python is None:
        pytest.skip("an ordinary user cannot run this version of Python")
    cli = (python, "-m", "weightstream.cli")
    mounted = run(*cli, "mount", bucket.uri, nobodys / "mnt")
    assert mounted.returncode == 0, mounted.stderr
    try:
        read = run("sha256sum", nobodys / "mnt" / "a.bin")
        assert read.stdout.split()[0] == hashlib.sha256(OLD).hexdigest()
        rows = {row["directory"]: row for row in json.loads(run(*cli, "mounts", "--json").stdout)}
        assert rows[str(nobodys / "mnt")]["driver"] == "fuse-python"
    finally:
        ended = run(*cli, "umount", nobodys / "mnt")
    assert ended.returncode == 0, ended.stderr
    assert str(nobodys) not in Path("/proc/mounts").read_text()
