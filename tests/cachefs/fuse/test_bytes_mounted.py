"""Bytes through a real mount: reads, mappings, direct I/O, passthrough and the switch to it."""

import errno
import mmap
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.cachefs.fuse.harness import Mount, Reader, errno_of, serving, until
from tests.cachefs.fuse.scenes import made_bytes

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SIZE = 3 * MIB + 4321


def wanted(path: str, version: str = "1", size: int = SIZE) -> bytes:
    return made_bytes(path, version, size)


def direct_read(path: Path, count: int, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, count) as buffer:
            got = os.preadv(fd, [buffer], offset)
            return buffer[:got]
    finally:
        os.close(fd)


def read_requests(mount: Mount) -> int:
    return mount.counts().get("read", 0)


def test_a_file_that_fills_reads_right(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": SIZE, "empty.bin": 0}) as mount:
        path = mount.path / "a.bin"
        assert path.read_bytes() == wanted("a.bin")
        assert (mount.path / "empty.bin").read_bytes() == b""
        with path.open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 10, SIZE - 4) == wanted("a.bin")[-4:]
            assert os.pread(file.fileno(), 10, SIZE + 4) == b""
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == wanted("a.bin")


def test_what_was_read_stays_in_the_kernel(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": SIZE}) as mount:
        (mount.path / "a.bin").read_bytes()
        reads = read_requests(mount)
        assert (mount.path / "a.bin").read_bytes() == wanted("a.bin")
        assert read_requests(mount) == reads


def test_what_has_no_version_is_read_anew_at_each_open(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": [SIZE, ""]}) as mount:
        assert (mount.path / "a.bin").read_bytes() == wanted("a.bin", "")
        reads = read_requests(mount)
        assert (mount.path / "a.bin").read_bytes() == wanted("a.bin", "")
        assert read_requests(mount) > reads


def test_direct_reads_of_a_file_that_fills(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": SIZE}) as mount:
        path = mount.path / "a.bin"
        for offset in (0, MIB, SIZE // 4096 * 4096):
            data = direct_read(path, MIB, offset)
            assert data == wanted("a.bin")[offset : offset + MIB]
        reads = read_requests(mount)
        direct_read(path, MIB, 0)
        assert read_requests(mount) > reads  # nothing stays in the page cache
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == wanted("a.bin")
        os.close(fd)
        assert path.read_bytes() == wanted("a.bin")


def test_readahead_is_set_and_requests_are_large(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": 16 * MIB}, read_ahead_bytes=8 * MIB) as mount:
        device = os.stat(mount.path).st_dev
        knob = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        assert until(lambda: knob.read_text().strip() == "8192")
        assert (mount.path / "a.bin").read_bytes() == wanted("a.bin", size=16 * MIB)
        assert max(stop - start for _, start, stop in mount.call("reads")) >= MIB
        assert read_requests(mount) < 40


# ---- complete files


def test_complete_files_are_read_without_a_single_request(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": [SIZE, "1", True]}) as mount:
        path = mount.path / "a.bin"
        assert path.read_bytes() == wanted("a.bin")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == wanted("a.bin")
        assert direct_read(path, MIB, MIB) == wanted("a.bin")[MIB : 2 * MIB]
        assert read_requests(mount) == 0
        assert mount.call("reads") == []


def test_one_backing_file_for_all_who_have_it_open(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": [SIZE, "1", True], "b.bin": [SIZE, "1", True]}) as mount:
        files = [(mount.path / name).open("rb") for name in ("a.bin", "b.bin") for _ in range(20)]
        assert mount.call("server.gauges")["passthrough_files"] == 2
        assert mount.call("opens") == {"a.bin": 20, "b.bin": 20}
        for file in files:
            assert file.read(100) in (wanted("a.bin")[:100], wanted("b.bin")[:100])
            file.close()
        assert until(lambda: mount.call("server.gauges")["passthrough_files"] == 0)
        assert until(lambda: mount.call("opens") == {})
        assert mount.call("server.gauges")["open_files"] == 0


def test_a_file_that_completes_is_passed_through_from_its_next_open(tmp_path: Path) -> None:
    with serving(tmp_path, {"f/a.bin": SIZE}) as mount:
        path = mount.path / "f/a.bin"
        before = path.stat()
        with path.open("rb") as early:
            assert early.read(10) == wanted("f/a.bin")[:10]
            mount.call("complete", "f/a.bin")
            with path.open("rb") as late:
                reads = read_requests(mount)
                assert late.read() == wanted("f/a.bin")
                assert read_requests(mount) == reads
                early.seek(0)
                assert early.read() == wanted("f/a.bin")
        after = path.stat()
        assert (before.st_ino, before.st_size, before.st_mtime_ns) == (
            after.st_ino, after.st_size, after.st_mtime_ns,
        )  # fmt: skip


def test_an_open_that_waits_for_the_fill_is_passed_through(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": SIZE, "b.bin": 10}) as mount:
        mount.call("wait_in_open", "a.bin")
        with ThreadPoolExecutor(thread_name_prefix="weightstream-test") as pool:
            data = pool.submit((mount.path / "a.bin").read_bytes)
            assert until(lambda: mount.call("opens") == {"a.bin": 1})
            assert (mount.path / "b.bin").read_bytes() == wanted("b.bin", size=10)
            mount.call("complete", "a.bin")
            mount.call("end_open_waits")
            assert data.result(60) == wanted("a.bin")
        assert [path for path, _, _ in mount.call("reads")] == ["b.bin"]
        assert until(lambda: mount.call("opens") == {})


def test_reopening_an_open_file_works_before_and_after_it_completes(tmp_path: Path) -> None:
    """An open by descriptor has no name that could be looked up again."""
    with serving(tmp_path, {"a.bin": SIZE}) as mount:
        with (mount.path / "a.bin").open("rb") as file:
            again = Path(f"/proc/self/fd/{file.fileno()}")
            assert again.read_bytes() == wanted("a.bin")
            mount.call("complete", "a.bin")
            for _ in range(3):
                assert again.read_bytes() == wanted("a.bin")
        with (mount.path / "a.bin").open("rb") as file:
            mount.call("evict", "a.bin")
            assert Path(f"/proc/self/fd/{file.fileno()}").read_bytes() == wanted("a.bin")


def test_an_evicted_file_is_read_from_the_origin_again(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": [SIZE, "1", True]}) as mount:
        path = mount.path / "a.bin"
        with path.open("rb") as early:
            mount.call("evict", "a.bin")
            assert path.read_bytes() == wanted("a.bin")  # from what was unlinked
            assert early.read() == wanted("a.bin")
            assert read_requests(mount) == 0
        assert until(lambda: nothing_is_left(mount))
        assert path.read_bytes() == wanted("a.bin")  # through the server
        assert read_requests(mount)
        mount.call("complete", "a.bin")
        reads = read_requests(mount)
        assert path.read_bytes() == wanted("a.bin")
        assert read_requests(mount) == reads


def test_without_passthrough_complete_files_are_read_all_the_same(tmp_path: Path) -> None:
    files = {"a.bin": [SIZE, "1", True], "b.bin": SIZE}
    with serving(tmp_path, files, passthrough=False) as mount:
        assert mount.init is not None
        assert not mount.init["passthrough"]
        assert (mount.path / "a.bin").read_bytes() == wanted("a.bin")
        assert (mount.path / "b.bin").read_bytes() == wanted("b.bin")
        mount.call("complete", "b.bin")
        assert (mount.path / "b.bin").read_bytes() == wanted("b.bin")
        assert read_requests(mount)


def test_a_replaced_file_keeps_its_bytes_where_it_is_open(tmp_path: Path) -> None:
    with serving(tmp_path, {"f/a.bin": SIZE}) as mount:
        path = mount.path / "f/a.bin"
        with path.open("rb", buffering=0) as old:
            assert os.pread(old.fileno(), 4096, 0) == wanted("f/a.bin")[:4096]
            mount.call("put", "f/a.bin", SIZE, "2")
            assert mount.call("server.settle", 30)
            assert path.read_bytes() == wanted("f/a.bin", "2")
            assert os.pread(old.fileno(), MIB, MIB) == wanted("f/a.bin")[MIB : 2 * MIB]


def test_the_rest_of_a_version_that_is_gone_is_stale(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": 64 * MIB}) as mount:
        with (mount.path / "a.bin").open("rb", buffering=0) as file:
            mount.call("lose", "a.bin")
            assert errno_of(lambda: os.pread(file.fileno(), 4096, 0)) == "ESTALE"
        assert mount.call("child.errors")["ESTALE"]


# ---- waiting


def test_reads_that_wait_stop_nobody_else(tmp_path: Path) -> None:
    """R21 for bytes: far more readers wait than there are threads."""
    files = {f"held{i:02}.bin": 5 for i in range(40)} | {"good.bin": 5}
    with serving(tmp_path, files) as mount:
        held = [f"held{i:02}.bin" for i in range(40)]
        for name in held:
            mount.call("hold", name)
        with ThreadPoolExecutor(40, thread_name_prefix="weightstream-test") as pool:
            reads = [pool.submit((mount.path / name).read_bytes) for name in held]
            assert until(lambda: mount.call("parked") == 40)
            assert (mount.path / "good.bin").read_bytes() == wanted("good.bin", size=5)
            assert len(os.listdir(mount.path)) == 41
            for name in held:
                mount.call("let_go", name)
            assert [read.result(60) for read in reads] == [wanted(n, size=5) for n in held]
        assert mount.call("server.gauges")["waiting_requests"] == 0


READ = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: (_ for _ in ()).throw(InterruptedError("signal")))
fd = os.open(sys.argv[1], os.O_RDONLY | (os.O_DIRECT if "direct" in sys.argv else 0))
print("open", flush=True)
import mmap
buffer = mmap.mmap(-1, 4096)
try:
    os.preadv(fd, [buffer], 0)
except InterruptedError as error:
    print("interrupted", flush=True)
"""


def test_r22_a_signal_frees_a_reader_who_waits(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": SIZE}) as mount:
        mount.call("hold", "a.bin")
        with Reader(READ, mount.path / "a.bin", "direct") as reader:
            assert reader.line() == "open"
            assert until(lambda: mount.call("parked"))
            reader.signal(signal.SIGUSR1)
            assert reader.line() == "interrupted"
        assert until(lambda: mount.call("parked") == 0)
        assert mount.call("server.gauges")["waiting_requests"] == 0
        mount.call("let_go", "a.bin")
        assert (mount.path / "a.bin").read_bytes() == wanted("a.bin")


@pytest.mark.parametrize("how", ["direct", "cached"])
def test_r22_a_reader_who_waits_can_be_killed(tmp_path: Path, how: str) -> None:
    with serving(tmp_path, {"a.bin": SIZE}) as mount:
        mount.call("hold", "a.bin")
        with Reader(READ, mount.path / "a.bin", how) as reader:
            assert reader.line() == "open"
            assert until(lambda: mount.call("parked"))
            reader.signal(signal.SIGKILL)
            assert reader.wait() == -9
        mount.call("let_go", "a.bin")
        assert until(lambda: mount.call("server.gauges")["open_files"] == 0)
        assert mount.call("server.gauges")["waiting_requests"] == 0
        assert (mount.path / "a.bin").read_bytes() == wanted("a.bin")


# ---- never both modes


def storm(work: Callable[[], None], switch: Callable[[], None]) -> list[BaseException]:
    """Do the work on six threads while files are switched; return what failed."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def run() -> None:
        while not stop.is_set():
            try:
                work()
            except BaseException as error:
                failures.append(error)

    running = [
        threading.Thread(target=run, name="weightstream-test", daemon=True) for _ in range(6)
    ]
    for thread in running:
        thread.start()
    try:
        switch()
    finally:
        stop.set()
        for thread in running:
            thread.join(60)
    return failures


def check(mount: Mount, name: str) -> None:
    """Read and map a part of a file of 2 MiB."""
    expected = made_bytes(name, "1", 2 * MIB)
    with (mount.path / name).open("rb", buffering=0) as file:
        assert file.read(4096) == expected[:4096]
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[MIB : MIB + 4096] == expected[MIB : MIB + 4096]


def nothing_is_left(mount: Mount) -> bool:
    gauges = mount.call("server.gauges")
    left = gauges["passthrough_files"] + gauges["open_files"] + gauges["waiting_requests"]
    return not mount.call("opens") and not left


def test_r35_no_open_fails_while_files_complete(tmp_path: Path) -> None:
    """Opens of one inode in both modes would be EIO."""
    names = [f"f/{i}.bin" for i in range(60)]
    with serving(tmp_path, dict.fromkeys(names, 2 * MIB)) as mount:
        now = names[:2]

        def work() -> None:
            for name in list(now):
                check(mount, name)

        def switch() -> None:
            for name, following in zip(names, names[2:], strict=False):
                mount.call("complete", name)
                now[:] = [now[1], following]

        assert storm(work, switch) == [], mount.log()[-4000:]
        assert until(lambda: nothing_is_left(mount))
        assert mount.call("child.errors").get("EIO", 0) == 0


def test_r35_files_that_complete_and_vanish_all_the_time_mix_no_modes(tmp_path: Path) -> None:
    """Two switches within one open are ESTALE; EIO would mean that modes met in one inode."""
    names = [f"f/{i}.bin" for i in range(3)]
    with serving(tmp_path, dict.fromkeys(names, 2 * MIB)) as mount:

        def work() -> None:
            for name in names:
                try:
                    check(mount, name)
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise

        def switch() -> None:
            for _ in range(50):
                for what in ("complete", "evict"):
                    for name in names:
                        mount.call(what, name)

        assert storm(work, switch) == [], mount.log()[-4000:]
        assert until(lambda: nothing_is_left(mount))
