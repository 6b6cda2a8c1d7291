"""What people run on a mount: safetensors, transformers, cp, sha256sum, dd, mmap (R18, R30 too)."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.kit import models
from tests.kit.models import random_bytes
from tests.kit.processes import run_python, start_python
from tests.mount.conftest import Bucket, until

from weightstream.demo.checksum import raw_bytes
from weightstream.demo.minilm import packaged_folder

pytestmark = pytest.mark.fuse
MIB = 1 << 20


def test_command_line_tools_read_the_right_bytes(bucket: Bucket, tmp_path: Path) -> None:
    data = bucket.put("w.bin", random_bytes(10 * MIB + 77, "tools"))
    mounted = bucket.mount()
    path, digest = str(mounted.path / "w.bin"), hashlib.sha256(data).hexdigest()
    assert _out("sha256sum", path).split()[0] == digest
    _out("cp", path, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == data
    _out("dd", f"if={path}", f"of={tmp_path / 'direct'}", "iflag=direct", "bs=1M", "status=none")
    assert (tmp_path / "direct").read_bytes() == data
    _out("cmp", path, str(tmp_path / "copy"))
    _out("tar", "-C", str(mounted.path), "-cf", str(tmp_path / "all.tar"), ".")
    code = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file:
    emit(hashlib.sha256(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).hexdigest())
"""
    assert run_python(code, path).value == digest


def _out(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout


def test_safe_open_reads_a_cold_sharded_model(bucket: Bucket) -> None:
    files = models.sharded(4, 24 * MIB, seed="safe-open")
    bucket.put_files(files)
    mounted = bucket.mount()
    code = """
import sys, glob, hashlib, torch
from safetensors import safe_open
digests = {}
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            raw = file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
            digests[name] = hashlib.sha256(raw).hexdigest()
emit(digests)
"""
    found = run_python(code, mounted.path, timeout_s=100).value
    expected = {
        name: hashlib.sha256(raw_bytes(tensor)).hexdigest()
        for name, tensor in models.tensors(files).items()
    }
    assert found == expected
    shards = [name for name in files if name.endswith(".safetensors")]
    assert mounted.complete(*shards)
    size = sum(len(files[name]) for name in shards)
    assert sum(bucket.sent(name) for name in shards) <= 1.05 * size


def test_a_killed_server_is_not_noticed_by_a_load_of_four_shards(bucket: Bucket) -> None:
    from tests.kit import faults as f

    files = models.sharded(4, 32 * MIB, seed="killed")
    bucket.put_files(files)
    bucket.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(10e6))
    mounted = bucket.mount()
    code = """
import sys, glob
from safetensors.torch import load_file
tensors = {}
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    emit("next")
    tensors |= load_file(path)
    for tensor in tensors.values():
        tensor.view(__import__("torch").uint8).sum()
emit(len(tensors))
"""
    with start_python(code, mounted.path) as loader:
        loader.wait_for(lambda: len(loader.values()) >= 2)
        mounted.kill_server()
        assert loader.result(100).value == len(models.tensors(files))


def test_transformers_loads_minilm_through_the_mount(bucket: Bucket) -> None:
    pytest.importorskip("transformers")
    folder = packaged_folder()
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.put(str(path.relative_to(folder)), path.read_bytes())
    mounted = bucket.mount()
    code = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
words = AutoTokenizer.from_pretrained(sys.argv[1])("weights from the bucket", return_tensors="pt")
model = AutoModel.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    emit(model(**words).last_hidden_state.mean(1)[0][:8].tolist())
"""
    env = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    through = run_python(code, mounted.path, env=env, timeout_s=110).value
    native = run_python(code, folder, env=env, timeout_s=110).value
    assert through == native


def test_sixty_four_threads_that_fault_at_once_all_get_their_bytes(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(96 * MIB, "faults"))
    mounted = bucket.mount()
    code = """
import ctypes, hashlib, mmap, sys, threading
f = open(sys.argv[1], "rb")
view = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
step, wrong = len(view) // 64, []
barrier = threading.Barrier(64)
digests = [None] * 64
def touch(i):
    barrier.wait()
    digests[i] = hashlib.sha256(memoryview(view)[i * step : (i + 1) * step]).hexdigest()
threads = [threading.Thread(target=touch, args=(i,)) for i in range(64)]
[t.start() for t in threads]
[t.join() for t in threads]
emit(digests)
"""
    digests = run_python(code, mounted.path / "w.bin", timeout_s=110).value
    step = len(data) // 64
    assert digests == [
        hashlib.sha256(data[i * step : (i + 1) * step]).hexdigest() for i in range(64)
    ]


def test_r18_many_open_files_and_readers_stay_within_memory(bucket: Bucket) -> None:
    files = {f"d/{i:03}.bin": random_bytes(64 << 10, f"r18-{i}") for i in range(500)}
    big = bucket.put("big.bin", random_bytes(80 * MIB, "r18"))
    bucket.put_files(files)
    mounted = bucket.mount()
    handles = [(mounted.path / name).open("rb", buffering=0) for name in files]
    wrong: list[int] = []

    def read(seed: int) -> None:
        with (mounted.path / "big.bin").open("rb", buffering=0) as file:
            for i in range(4):
                at = (seed * 1_250_000 + i * 700_001) % (len(big) - 100_000)
                if os.pread(file.fileno(), 100_000, at) != big[at : at + 100_000]:
                    wrong.append(at)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(64)]
    for thread in threads:
        thread.start()
    for handle, data in zip(handles, files.values(), strict=True):
        assert handle.read() == data
    for thread in threads:
        thread.join()
    assert wrong == []
    budget = int(bucket.settings.memory_budget)
    status = Path(f"/proc/{mounted.server_pid}/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) << 10
    assert peak <= budget + 300 * MIB  # measured by the bench: 150
    for handle in handles:
        handle.close()
    assert until(lambda: set(mounted.gauges().values()) == {0})


def test_r30_a_log_that_cannot_be_written_costs_no_read(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(3 * MIB, "r30"))
    mounted = bucket.mount()
    log = Path(str(mounted.info()["log"]))
    log.unlink(missing_ok=True)  # rotated away
    assert (mounted.path / "w.bin").read_bytes() == data
    assert mounted.info()["state"] == "ready"


def test_mounts_names_what_is_mounted(bucket: Bucket) -> None:
    bucket.put("w.bin", b"x")
    mounted = bucket.mount()
    info = mounted.info()
    assert (info["uri"], info["driver"], info["state"]) == (bucket.uri, "kernel", "ready")
    text = bucket.cli("mounts").stdout
    assert str(mounted.path) in text
    assert bucket.uri in text
    assert json.loads(bucket.cli("mounts", "--json").stdout)


def test_a_loader_on_a_mounted_path_reads_through_the_store(bucket: Bucket) -> None:
    files = models.plain(4 * MIB, seed="path")
    bucket.put_files(files)
    mounted = bucket.mount()
    code = """
import sys, weightstream
emit(sorted(weightstream.load(sys.argv[1])))
"""
    names = run_python(code, mounted.path, env=bucket.env, timeout_s=100).value
    assert names == sorted(models.tensors(files))
    assert mounted.complete("model.safetensors")


def test_without_privileges_and_fusermount_the_error_says_what_to_install(bucket: Bucket) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv")
    bucket.put("w.bin", b"x")
    path = bucket.root / "plain"
    path.mkdir()
    command = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable]
    command += ["-m", "weightstream.cli", "mount", bucket.uri, str(path), "--driver", "kernel"]
    home = {"HOME": "/nonexistent", "XDG_RUNTIME_DIR": str(bucket.root)}
    done = subprocess.run(
        command,
        env={**os.environ, **bucket.env, **home},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
