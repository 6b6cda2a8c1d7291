"""Origins that fail, change, stall and hang behind a mount (R9, R10, R19-R23)."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.kit import faults as f
from tests.kit.models import random_bytes
from tests.kit.processes import start_python
from tests.mount.conftest import Bucket, errno_of, until

pytestmark = pytest.mark.fuse
MIB = 1 << 20
RANGES = f.When(key="w.bin", ranged=True, times=None)


@pytest.mark.parametrize(
    ("when", "fault"),
    [
        (f.When(key="w.bin", ranged=True, where=lambda r: hash(r.range) % 5 == 0), f.SLOW_DOWN),
        (f.When(key="w.bin", ranged=True, nth=2, times=3), f.Reset(300_000)),
        (f.When(key="w.bin", ranged=True, nth=2, times=2), f.ShortBody(100_000)),
        (f.When(key="w.bin", ranged=True, nth=2, times=2), f.ContentRange(shift=4096)),
        (f.When(key="w.bin", ranged=True, nth=3), f.Stall(60.0, after_bytes=50_000)),
        (f.When(key="w.bin", ranged=True, nth=2, times=2), f.INTERNAL_ERROR),
        (RANGES, f.Drip(20e6)),
    ],
    ids=["503", "reset", "short", "content-range", "stall", "500", "slow"],
)
def test_r9_faults_of_the_origin_cost_time_and_no_byte(
    bucket: Bucket, when: f.When, fault: f.Fault
) -> None:
    data = bucket.put("w.bin", random_bytes(6 * MIB, "r9"))
    mounted = bucket.mount()
    bucket.proxy.add(when, fault)
    assert (mounted.path / "w.bin").read_bytes() == data


def test_r9_an_origin_that_stays_down_is_an_error_within_the_deadline(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(3 * MIB, "down"))
    bucket.options["deadline_s"] = 2.0
    mounted = bucket.mount()
    bucket.proxy.add(RANGES, f.INTERNAL_ERROR)
    assert errno_of((mounted.path / "w.bin").read_bytes) == errno.EIO
    bucket.proxy.clear()
    assert until(lambda: _reads(mounted.path / "w.bin", data))


def _reads(path: "os.PathLike[str]", data: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read() == data
    except OSError:
        return False


def test_r10_a_replaced_object_is_never_mixed(bucket: Bucket) -> None:
    old = bucket.put("w.bin", random_bytes(12 * MIB, "old"))
    bucket.options["fill"] = "off"
    mounted = bucket.mount()
    with (mounted.path / "w.bin").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4096, 0) == old[:4096]
        new = bucket.put("w.bin", random_bytes(12 * MIB, "new"))
        mounted.refresh()
        assert (mounted.path / "w.bin").read_bytes() == new
        assert os.pread(file.fileno(), 4096, 0) == old[:4096]
        assert errno_of(lambda: os.pread(file.fileno(), 4096, 11 * MIB)) == errno.ESTALE
    assert (mounted.path / "w.bin").read_bytes() == new


def test_r10_a_replacement_is_noticed_by_the_read_itself(bucket: Bucket) -> None:
    bucket.put("w.bin", random_bytes(12 * MIB, "one"))
    bucket.options["fill"] = "off"
    mounted = bucket.mount()
    size = (mounted.path / "w.bin").stat().st_size
    new = bucket.put("w.bin", random_bytes(11 * MIB, "two"))
    with (mounted.path / "w.bin").open("rb", buffering=0) as file:
        assert errno_of(lambda: os.pread(file.fileno(), 4096, 0)) == errno.ESTALE
    assert until(lambda: (mounted.path / "w.bin").stat().st_size not in (0, size))
    assert (mounted.path / "w.bin").read_bytes() == new


def test_a_deleted_object_vanishes_and_the_others_stay(bucket: Bucket) -> None:
    bucket.put("gone.bin", b"x" * 1000)
    bucket.put("stays.bin", b"y" * 1000)
    mounted = bucket.mount()
    assert (mounted.path / "gone.bin").exists()
    bucket.s3.delete(f"models/{bucket.prefix}/gone.bin")
    mounted.refresh()
    assert not (mounted.path / "gone.bin").exists()
    assert os.listdir(mounted.path) == ["stays.bin"]


def test_r19_refreshing_while_readers_read_stops_nobody(bucket: Bucket) -> None:
    files = {f"x{i}.bin": random_bytes(2 * MIB, f"r19-{i}") for i in range(4)}
    bucket.put_files(files)
    mounted = bucket.mount()
    stop = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        while not stop.is_set():
            for name, data in files.items():
                if (mounted.path / name).read_bytes() != data:
                    wrong.append(name)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(3):
            mounted.refresh()
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    os.kill(mounted.supervisor_pid, signal.SIGTERM)
    assert until(lambda: not mounted.is_mounted())


def test_r20_a_hung_origin_does_not_keep_a_mount_from_ending(bucket: Bucket) -> None:
    bucket.put("w.bin", random_bytes(12 * MIB, "r20"))
    mounted = bucket.mount()
    bucket.proxy.add(RANGES, f.Stall(300.0))
    code = "import sys; open(sys.argv[1], 'rb').read()"
    with start_python(code, mounted.path / "w.bin", env=bucket.env) as reader:
        assert until(lambda: mounted.gauges()["parked_reads"])
        supervisor = mounted.supervisor_pid
        begun_s = time.monotonic()
        os.kill(supervisor, signal.SIGTERM)
        assert until(lambda: not mounted.is_mounted())
        assert time.monotonic() - begun_s < 20  # promised: 5
        assert reader.result(30).returncode != 0


def test_r21_stalled_reads_hold_up_nobody_else(bucket: Bucket) -> None:
    """More readers wait for a hung origin than the server has threads; others are served."""
    bucket.put("w.bin", random_bytes(40 * MIB, "r21"))
    warm = bucket.put("warm.bin", random_bytes(MIB, "warm"))
    bucket.options |= {"deadline_s": 60.0, "stall_timeout_s": 60.0, "hedge": "off", "fill": "off"}
    mounted = bucket.mount()
    assert (mounted.path / "warm.bin").read_bytes() == warm
    assert mounted.complete("warm.bin")
    bucket.proxy.add(RANGES, f.Stall(300.0))
    code = """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY)
threads = [threading.Thread(target=os.pread, args=(fd, 4096, i * 1000000)) for i in range(38)]
[thread.start() for thread in threads]
emit("all wait")
[thread.join() for thread in threads]
"""
    with start_python(code, mounted.path / "w.bin", env=bucket.env) as readers:
        readers.wait_for(lambda: bool(readers.values()))
        assert until(lambda: mounted.gauges()["parked_reads"] >= 38)
        command = [sys.executable, "-c", _LOOK_AROUND, str(mounted.path)]
        look = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert look.returncode == 0, look.stderr


_LOOK_AROUND = """
import os, sys
assert sorted(os.listdir(sys.argv[1])) == ["w.bin", "warm.bin"]
assert len(open(sys.argv[1] + "/warm.bin", "rb").read()) == 1 << 20
assert os.stat(sys.argv[1] + "/w.bin").st_size == 40 << 20
"""


@pytest.mark.parametrize(
    ("number", "flags"), [(signal.SIGINT, os.O_DIRECT), (signal.SIGKILL, 0)], ids=["int", "kill"]
)
def test_r22_a_signal_frees_a_blocked_reader(
    bucket: Bucket, number: signal.Signals, flags: int
) -> None:
    """In the page cache the kernel itself waits, and hears SIGKILL only; O_DIRECT hears all."""
    bucket.put("w.bin", random_bytes(3 * MIB, "r22"))
    bucket.options |= {"deadline_s": 40.0, "stall_timeout_s": 40.0, "hedge": "off"}
    mounted = bucket.mount()
    bucket.proxy.add(RANGES, f.Stall(300.0))
    code = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY | int(sys.argv[2]))
emit("go")
os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
"""
    with start_python(code, mounted.path / "w.bin", flags, env=bucket.env) as reader:
        reader.wait_for(lambda: bool(reader.values()))
        assert until(lambda: mounted.gauges()["parked_reads"])
        os.kill(reader.pid, number)
        assert reader.result(30).returncode != 0
    assert until(lambda: not mounted.gauges()["parked_reads"])


def test_r23_a_low_request_time_limit_of_the_kernel_is_kept(bucket: Bucket) -> None:
    """With `fs.fuse.max_request_timeout` a request that takes longer aborts the whole mount."""
    limit = Path("/proc/sys/fs/fuse/max_request_timeout")
    if not limit.exists():
        pytest.skip("this kernel has no time limit on requests")
    data = bucket.put("w.bin", random_bytes(3 * MIB, "r23"))
    bucket.options |= {"deadline_s": 120.0, "stall_timeout_s": 120.0, "hedge": "off"}
    before = limit.read_text()
    limit.write_text("10")
    try:
        mounted = bucket.mount()
    finally:
        limit.write_text(before)
    bucket.proxy.add(f.When(key="w.bin", ranged=True, times=None), f.Stall(300.0))
    with (mounted.path / "w.bin").open("rb", buffering=0) as file_:
        assert errno_of(lambda: os.pread(file_.fileno(), 4096, 0)) == errno.EIO
    bucket.proxy.clear()
    assert os.listdir(mounted.path) == ["w.bin"]  # not ENOTCONN: nobody aborted the mount
    assert mounted.server_pid
    assert (mounted.path / "w.bin").stat().st_size == len(data)


def test_find_asks_for_an_unchanged_prefix_once(bucket: Bucket) -> None:
    for i in range(12):
        bucket.put(f"d{i % 3}/f{i}", b"x")
    mounted = bucket.mount()
    subprocess.run(["find", str(mounted.path)], check=True, capture_output=True, timeout=60)
    asked = bucket.lists()
    for _ in range(2):
        command = ["ls", "-lR", str(mounted.path)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert bucket.lists() == asked
