"""R27: nothing can be written through a mount, by any door, and no byte of the store changes."""

import ctypes
import errno
import fcntl
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.cachefs.fuse.harness import Mount, errno_of, serving
from tests.cachefs.fuse.scenes import made_bytes

pytestmark = pytest.mark.fuse

SIZE = 64 << 10


@pytest.fixture(scope="module", params=["ro", "remounted rw"])
def mount(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mount]:
    """The mount as it is, and as root could make it: writable as far as the kernel knows."""
    files = {"f/filling.bin": SIZE, "f/complete.bin": [SIZE, "1", True]}
    with serving(tmp_path_factory.mktemp("writes"), files) as mount:
        if request.param != "ro":
            command = ["mount", "-i", "-o", "remount,rw", str(mount.path)]
            if subprocess.run(command, capture_output=True, timeout=30).returncode:
                pytest.skip("remounting is not possible here")
        yield mount


@pytest.fixture(params=["filling.bin", "complete.bin"])
def path(request: pytest.FixtureRequest, mount: Mount) -> Iterator[Path]:
    name = str(request.param)
    path = mount.path / "f" / name
    yield path
    expected = made_bytes(f"f/{name}", "1", SIZE)
    assert path.read_bytes() == expected
    assert all(
        data.read_bytes() == made_bytes("f/complete.bin", "1", SIZE)
        for data in mount.store.iterdir()
    )


def refused(call: Callable[[], object], *expected: str) -> None:
    assert errno_of(call) in (expected or ("EROFS",))


@pytest.mark.parametrize(
    "flags",
    [
        os.O_WRONLY,
        os.O_RDWR,
        os.O_RDONLY | os.O_TRUNC,
        os.O_WRONLY | os.O_TRUNC,
        os.O_RDWR | os.O_APPEND,
        os.O_RDWR | os.O_DIRECT,
        os.O_RDWR | os.O_CREAT,
        3,  # neither: what some ioctl users pass
    ],
)
def test_opens_for_writing(path: Path, flags: int) -> None:
    refused(lambda: os.open(path, flags))


def test_opens_for_writing_of_an_open_file(path: Path) -> None:
    with path.open("rb") as file:
        refused(lambda: os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR))


def test_what_changes_a_file(path: Path) -> None:
    refused(lambda: os.truncate(path, 0))
    refused(lambda: os.chmod(path, 0o666))
    refused(lambda: os.chown(path, 1, 1))
    refused(lambda: os.utime(path))
    refused(lambda: os.utime(path, ns=(1, 1)))
    refused(lambda: os.setxattr(path, "user.weightstream.etag", b"2"))
    refused(lambda: os.setxattr(path, "user.other", b"2"))
    refused(lambda: os.removexattr(path, "user.weightstream.etag"))


def test_what_changes_names(path: Path) -> None:
    folder = path.parent
    refused(lambda: os.unlink(path))
    refused(lambda: os.rename(path, folder / "other"))
    refused(lambda: os.rename(folder, folder.parent / "other"))
    refused(lambda: os.link(path, folder / "other"))
    refused(lambda: os.symlink(path, folder / "other"))
    refused(lambda: os.mkdir(folder / "other"))
    refused(lambda: os.rmdir(folder), "EROFS", "ENOTEMPTY")
    refused(lambda: os.mknod(folder / "other"))
    refused(lambda: os.mkfifo(folder / "other"))
    refused(lambda: os.open(folder / "other", os.O_CREAT | os.O_WRONLY))
    refused(lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR), "EROFS", "EOPNOTSUPP")
    assert sorted(os.listdir(folder)) == ["complete.bin", "filling.bin"]


def test_an_open_file_cannot_be_written(path: Path) -> None:
    with path.open("rb") as file:
        fd = file.fileno()
        refused(lambda: os.write(fd, b"x"), "EBADF")
        refused(lambda: os.pwrite(fd, b"x", 0), "EBADF")
        refused(lambda: os.ftruncate(fd, 0), "EINVAL", "EBADF")
        refused(lambda: os.posix_fallocate(fd, 0, SIZE * 2), "EBADF")
        refused(lambda: os.fchmod(fd, 0o666))
        refused(lambda: os.copy_file_range(fd, fd, 10, 0, SIZE // 2), "EBADF", "EINVAL")
        refused(lambda: mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_WRITE), "EACCES")
        refused(lambda: mmap.mmap(fd, 0, mmap.MAP_SHARED), "EACCES")


def test_a_shared_mapping_cannot_be_made_writable(path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    with path.open("rb") as file:
        at = libc.mmap(None, SIZE, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        at = ctypes.c_void_p(at)
        assert libc.mprotect(at, SIZE, mmap.PROT_READ | mmap.PROT_WRITE) == -1
        assert ctypes.get_errno() == errno.EACCES
        assert libc.munmap(at, SIZE) == 0


def test_a_private_mapping_is_the_applications_own(path: Path) -> None:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped[:4096] = b"x" * 4096
        mapped.flush()
        mapped.close()


def test_leases_and_attributes_give_no_way_in(path: Path) -> None:
    with path.open("rb") as file:
        for request in (0x40086602, 0x401C5820):  # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR
            assert errno_of(lambda r=request: fcntl.ioctl(file, r, bytearray(32)))  # type: ignore[misc]
