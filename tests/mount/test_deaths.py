"""What dies, and what applications notice (R5, R6, R7, R8)."""

import hashlib
import mmap
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from tests.kit import faults as f
from tests.kit.models import random_bytes
from tests.kit.processes import start_python
from tests.mount.conftest import Bucket, errno_of, until

from weightstream.cachefs.store import Store

pytestmark = pytest.mark.fuse
MIB = 1 << 20

_READ = """
import hashlib, sys
with open(sys.argv[1], "rb", buffering=0) as file:
    emit("open")
    digest, total = hashlib.sha256(), 0
    while block := file.read(1 << 20):
        digest.update(block)
        total += len(block)
        emit(total)
emit(digest.hexdigest())
"""


def test_r5_a_read_survives_the_death_of_the_server(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(16 * MIB, "r5"))
    bucket.proxy.add(f.When(key="w.bin", ranged=True, covers=9 * MIB, times=None), f.Stall(1.0))
    mounted = bucket.mount()
    with start_python(_READ, mounted.path / "w.bin", env=bucket.env) as reader:
        reader.wait_for(lambda: len(reader.values()) > 2)
        old = mounted.kill_server()
        outcome = reader.result(90)
    assert outcome.value == hashlib.sha256(data).hexdigest()
    assert mounted.server_pid != old


def test_r6_open_files_and_mappings_outlive_everybody(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(6 * MIB, "r6"))
    mounted = bucket.mount()
    assert (mounted.path / "w.bin").read_bytes() == data
    assert mounted.complete("w.bin")
    file = os.open(mounted.path / "w.bin", os.O_RDONLY)
    view = mmap.mmap(file, 0, prot=mmap.PROT_READ)
    try:
        supervisor, server = mounted.supervisor_pid, mounted.server_pid
        os.kill(supervisor, 9)
        os.kill(server, 9)
        assert until(lambda: not Path(f"/proc/{server}/exe").exists())
        assert os.pread(file, len(data), 0) == data
        assert view[:] == data
    finally:
        view.close()
        os.close(file)
    again = bucket.mount(directory=mounted.path)  # a dead mount is cleaned up, not an error
    assert (again.path / "w.bin").read_bytes() == data
    assert bucket.sent("w.bin") == len(data)


@pytest.mark.parametrize("delay_s", [0.1, 0.4, 0.8])
def test_r7_what_was_acknowledged_survives_a_death_in_mid_fill(
    bucket: Bucket, delay_s: float
) -> None:
    data = bucket.put("w.bin", random_bytes(32 * MIB, f"r7-{delay_s}"))
    bucket.options["concurrency"] = 4
    bucket.proxy.add(f.When(key="w.bin", ranged=True, times=None), f.Drip(3e6))  # 12 MB/s: 2.8 s
    mounted = bucket.mount()
    pids = (mounted.supervisor_pid, mounted.server_pid)
    file = os.open(mounted.path / "w.bin", os.O_RDONLY)
    try:
        assert os.read(file, 4096) == data[:4096]
        time.sleep(delay_s)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    finally:
        errno_of(lambda: os.close(file))  # nobody is left to hear of it
    assert until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids))
    sent = bucket.sent("w.bin")
    assert 0 < sent < len(data), "nothing was in flight: the test proves nothing"
    with Store.open(bucket.settings) as store:
        (info,) = [info for info in store.blobs() if info.blob.name == "w.bin"]
        with store.open_blob(info.blob) as stored:
            assert stored.verify(everything=True) == 0
            kept = stored.present_bytes()
    bucket.proxy.clear()
    again = bucket.mount(directory=mounted.path)
    assert (again.path / "w.bin").read_bytes() == data
    assert again.complete("w.bin")
    assert bucket.sent("w.bin") <= len(data) - kept + sent


def test_r8_upgrades_under_load_fail_no_read(bucket: Bucket) -> None:
    files = {f"u{i}.bin": random_bytes(5 * MIB, f"r8-{i}") for i in range(3)}
    bucket.put_files(files)
    mounted = bucket.mount()
    wrong: list[str] = []
    stop = threading.Event()
    rounds = [0]

    def load() -> None:
        while not stop.is_set():
            for name, data in files.items():
                try:
                    if (mounted.path / name).read_bytes() != data:
                        wrong.append(f"{name}: wrong bytes")
                except OSError as error:
                    wrong.append(f"{name}: {error}")
            rounds[0] += 1

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    pids = {mounted.server_pid}
    supervisor = mounted.supervisor_pid
    try:
        for _ in range(3):
            outcome = bucket.cli("mount", "--upgrade", mounted.path)
            assert outcome.returncode == 0, outcome.stderr
            pids.add(mounted.server_pid)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert rounds[0] > 0
    assert len(pids) == 4
    assert mounted.supervisor_pid == supervisor


def test_a_file_that_fills_is_read_on_after_three_deaths(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(24 * MIB, "deaths"))
    bucket.proxy.add(f.When(key="w.bin", ranged=True, times=None), f.Drip(8e6))
    mounted = bucket.mount()
    with start_python(_READ, mounted.path / "w.bin", env=bucket.env) as reader:
        reader.wait_for(lambda: len(reader.values()) > 1)
        for _ in range(3):
            old = mounted.kill_server()
            assert until(lambda old=old: mounted.server_pid not in (0, old))  # type: ignore[misc]
        assert reader.result(100).value == hashlib.sha256(data).hexdigest()
