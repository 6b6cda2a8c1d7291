"""A server is killed and another one goes on: what applications notice is a pause at most."""

import errno
import mmap
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.cachefs.fuse.harness import Mount, Reader, errno_of, serving, until
from tests.cachefs.fuse.scenes import made_bytes

from weightstream.cachefs.fuse import mount_table

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SIZE = 8 * MIB


def wanted(path: str, size: int = SIZE, version: str = "1") -> bytes:
    return made_bytes(path, version, size)


def test_r5_reads_in_flight_are_answered_by_the_next_server(tmp_path: Path) -> None:
    names = [f"{i}.bin" for i in range(8)]
    with serving(tmp_path, dict.fromkeys(names, SIZE)) as mount:
        for name in names:
            mount.call("hold", name)
        with ThreadPoolExecutor(len(names), thread_name_prefix="weightstream-test") as pool:
            reads = [pool.submit((mount.path / name).read_bytes) for name in names]
            assert until(lambda: mount.call("parked") >= len(names))
            mount.kill()
            assert not any(read.done() for read in reads)
            mount.restart()
            assert [read.result(60) for read in reads] == [wanted(name) for name in names]
        assert mount.call("server.gauges")["waiting_requests"] == 0


def test_r5_everything_that_waits_is_asked_again(tmp_path: Path) -> None:
    files = {"f/a.bin": SIZE, "hung/b.bin": SIZE, "opening.bin": SIZE, "other/c.bin": SIZE}
    with serving(tmp_path, files, deadline_s=600.0) as mount:
        for folder in ("hung", "other"):
            mount.call("hang", folder)
        mount.call("wait_in_open", "opening.bin")
        with ThreadPoolExecutor(4, thread_name_prefix="weightstream-test") as pool:
            listed = pool.submit(os.listdir, mount.path / "hung")
            found = pool.submit((mount.path / "other/c.bin").stat)
            opened = pool.submit((mount.path / "opening.bin").read_bytes)
            assert until(lambda: mount.call("server.gauges")["waiting_requests"] == 3)
            mount.kill()
            mount.restart()
            assert listed.result(60) == ["b.bin"]
            assert found.result(60).st_size == SIZE
            assert opened.result(60) == wanted("opening.bin")


def test_r5_servers_are_killed_again_and_again_under_load(tmp_path: Path) -> None:
    files = {f"f{i % 3}/{i}.bin": [MIB, "1", i % 2 == 0] for i in range(12)}
    with serving(tmp_path, files) as mount:
        stop = threading.Event()
        failures: list[BaseException] = []

        def load(numbers: range) -> None:
            try:
                while not stop.is_set():
                    for i in numbers:
                        name = f"f{i % 3}/{i}.bin"
                        assert (mount.path / name).read_bytes() == wanted(name, MIB)
                    assert os.listdir(mount.path) == ["f0", "f1", "f2"]
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=load, args=(range(i, 12, 4),), name="weightstream-test")
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                wanted_opens = mount.counts().get("open", 0) + 20
                assert until(lambda n=wanted_opens: mount.counts().get("open", 0) >= n)  # type: ignore[misc]
                mount.kill()
                mount.restart()
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert failures == []


def test_handles_of_a_dead_server_go_on(tmp_path: Path) -> None:
    """Files and folders that were opened before, also of a version that is not listed any more."""
    files = {f"f/{i:04}": 100 for i in range(1000)} | {"g/a.bin": SIZE, "d.bin": SIZE}
    with serving(tmp_path, files) as mount:
        scan = os.scandir(mount.path / "f")
        names = [next(scan).name]
        old = (mount.path / "g/a.bin").open("rb", buffering=0)
        direct = os.open(mount.path / "d.bin", os.O_RDONLY | os.O_DIRECT)
        folder = os.open(mount.path / "g", os.O_RDONLY)
        mount.kill()
        mount.restart(files | {"g/a.bin": [SIZE, "2"]})
        names += [entry.name for entry in scan]
        assert names == [f"{i:04}" for i in range(1000)]
        assert old.read() == wanted("g/a.bin")
        assert os.fstat(old.fileno()).st_size == SIZE
        with mmap.mmap(-1, MIB) as buffer:
            assert os.preadv(direct, [buffer], MIB) == MIB
            assert buffer[:] == wanted("d.bin")[MIB : 2 * MIB]
        assert os.listdir(folder) == ["a.bin"]
        assert os.stat("a.bin", dir_fd=folder).st_size == SIZE
        for fd in (direct, folder):
            os.close(fd)
        old.close()


def test_r6_complete_files_do_not_notice_at_all(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": [SIZE, "1", True]}) as mount:
        with (mount.path / "a.bin").open("rb", buffering=0) as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            mount.kill()  # nobody serves now
            assert file.read() == wanted("a.bin")
            assert mapped[:] == wanted("a.bin")
            mount.restart()
            # The kernel takes one backing file for an inode that is open, so the id must be kept.
            with (mount.path / "a.bin").open("rb") as second:
                assert second.read() == wanted("a.bin")
            assert mount.call("server.gauges")["passthrough_files"] == 1
            mapped.close()
        assert until(lambda: mount.call("server.gauges")["passthrough_files"] == 0)
        assert (mount.path / "a.bin").read_bytes() == wanted("a.bin")
        assert mount.counts().get("read", 0) == 0
        assert "EIO" not in mount.call("child.errors")


def test_r6_complete_files_outlive_the_mount(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": [SIZE, "1", True]}) as mount:
        code = """
import mmap, sys
file = open(sys.argv[1], "rb", buffering=0)
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
print("open", flush=True)
sys.stdin.readline()
import hashlib
print(hashlib.sha256(file.read()).hexdigest(), hashlib.sha256(mapped[:]).hexdigest(), flush=True)
"""
        reader = Reader(code, mount.path / "a.bin")
        assert reader.line() == "open"
    with reader:  # unmounted lazily, server killed, /dev/fuse closed
        import hashlib

        digest = hashlib.sha256(wanted("a.bin")).hexdigest()
        reader.tell()
        assert reader.line() == f"{digest} {digest}"


def test_closed_in_the_pause_between_two_servers(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": [SIZE, "1", True], "b.bin": SIZE}) as mount:
        files = [(mount.path / name).open("rb") for name in ("a.bin", "b.bin")]
        mount.kill()
        for file in files:
            file.close()
        mount.restart()
        assert until(lambda: mount.call("server.gauges")["passthrough_files"] == 0)
        assert (mount.path / "a.bin").read_bytes() == wanted("a.bin")


def test_an_open_in_flight_is_one_handle(tmp_path: Path) -> None:
    """The first server counts an open and dies before it answers; the second counts it again."""
    with serving(tmp_path, {"a.bin": SIZE}) as mount:
        mount.call("wait_in_open", "a.bin")
        with ThreadPoolExecutor(1, thread_name_prefix="weightstream-test") as pool:
            opened = pool.submit((mount.path / "a.bin").open, "rb")
            assert until(lambda: mount.call("opens"))
            mount.kill()
            mount.restart({"a.bin": [SIZE, "1", True]})
            with opened.result(60) as file:
                assert file.read() == wanted("a.bin")
        assert until(lambda: mount.call("opens") == {})
        assert mount.call("server.gauges")["passthrough_files"] == 0


def test_a_server_killed_before_init_is_replaced(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": 10}) as mount:
        assert (mount.path / "a.bin").stat().st_size == 10
        # As if the first server had answered INIT and could not tell its supervisor.
        mount.kill()
        mount.init = None
        mount.start()
        assert until(lambda: errno_of((mount.path / "a.bin").read_bytes) == "")
        mount.init = mount.call("child.await_ready")
        assert mount.init is not None
        assert mount.init["passthrough"]


def test_a_server_hears_that_it_is_unmounted(tmp_path: Path) -> None:
    with serving(tmp_path, {"a.bin": 10}) as mount:
        assert (mount.path / "a.bin").read_bytes()
        mount_table.unmount(str(mount.path))
        assert mount.call("child.await_end")
        assert "Traceback" not in mount.log()


def test_r19_a_stopped_server_answers_and_says_nothing(tmp_path: Path) -> None:
    """What was asked meanwhile, and what it was about to say, is for the next one."""
    with serving(tmp_path, {"f/a.bin": SIZE, "f/b.bin": 5}) as mount:
        mount.call("hold", "f/a.bin")
        with ThreadPoolExecutor(2, thread_name_prefix="weightstream-test") as pool:
            data = pool.submit((mount.path / "f/a.bin").read_bytes)
            assert until(lambda: mount.call("parked"))
            mount.call("server.stop")
            for i in range(200):
                mount.call("put", "f/b.bin", 5, str(i))
            mount.call("let_go", "f/a.bin")
            asked = pool.submit(os.listdir, mount.path)
            assert not data.done()
            mount.kill()
            mount.restart()
            assert data.result(60) == wanted("f/a.bin")
            assert asked.result(60) == ["f"]


def test_r19_names_are_invalidated_under_the_feet_of_those_who_read(tmp_path: Path) -> None:
    files = {f"f/{i}.bin": 2 * MIB for i in range(4)}
    with serving(tmp_path, files) as mount:
        stop = threading.Event()
        failures: list[BaseException] = []

        def read(name: str) -> None:
            try:
                while not stop.is_set():
                    data = (mount.path / name).read_bytes()
                    version = data.split(b" ", 2)[1].decode()
                    assert data == wanted(name, len(data), version)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=read, args=(name,), name="weightstream-test") for name in files
        ]
        for thread in threads:
            thread.start()
        for version in range(2, 60):
            for name in files:
                mount.call("put", name, 2 * MIB, str(version))
        assert mount.call("server.settle", 60)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert failures == []


def in_states(mount: Mount) -> set[str]:
    """Return the states of the server's threads: D is a wait that no signal ends."""
    tasks = Path(f"/proc/{mount.process.pid}/task")
    return {
        line.rpartition(")")[2].split()[0]
        for task in tasks.iterdir()
        for line in [(task / "stat").read_text()]
    }


def test_r19_news_about_a_folder_that_hangs_do_not_wait_for_it(tmp_path: Path) -> None:
    """Whoever lists holds the folder's lock; the kernel would take it to forget a name."""
    with serving(tmp_path, {"f/a.bin": 5, "g/b.bin": 5}, deadline_s=600.0) as mount:
        assert (mount.path / "f/a.bin").read_bytes()
        mount.call("expire", "f")
        mount.call("hang", "f")
        lookers = [
            subprocess.Popen(["stat", str(mount.path / "f" / name)], stderr=subprocess.DEVNULL)
            for name in ("x", "y")
        ]
        assert until(lambda: mount.call("server.gauges")["waiting_requests"])
        mount.call("complete", "f/a.bin")
        assert mount.call("server.settle", 30)
        assert "D" not in in_states(mount)
        mount.call("unhang", "f")
        assert [looker.wait(30) for looker in lookers] == [1, 1]
