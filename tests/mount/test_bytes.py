"""Names and bytes through a mount are those of the bucket (R1, R2, R3, R13, R25, R35)."""

import hashlib
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from tests.kit import faults as f
from tests.kit.models import random_bytes
from tests.kit.processes import run_python, start_python
from tests.mount.conftest import Bucket

pytestmark = pytest.mark.fuse
MIB = 1 << 20


def tree_of(root: Path) -> dict[str, bytes]:
    """Return every file below a directory with its bytes."""
    return {
        str(Path(folder, name).relative_to(root)): Path(folder, name).read_bytes()
        for folder, _, names in os.walk(root)
        for name in names
    }


def test_a_bucket_is_there_as_files(bucket: Bucket) -> None:
    files = {
        "config.json": b"{}",
        "a/b/deep.txt": b"deep",
        "weights.bin": random_bytes(3 * MIB, "w"),
    }
    bucket.put_files(files)
    mounted = bucket.mount()
    assert tree_of(mounted.path) == files
    assert sorted(os.listdir(mounted.path)) == ["a", "config.json", "weights.bin"]
    status = (mounted.path / "weights.bin").stat()
    assert (status.st_size, status.st_mode & 0o777, status.st_nlink) == (3 * MIB, 0o444, 1)
    assert (mounted.path / "a").stat().st_mode & 0o777 == 0o555
    assert os.getxattr(mounted.path / "config.json", "user.weightstream.uri").decode() == (
        f"{bucket.uri}/config.json"
    )
    assert mounted.umount().returncode == 0
    assert not mounted.is_mounted()


NAMES = ("a.bin", "b.bin", "f/c.bin", "f/d.bin", "f/g/e.bin")


def test_r1_names_and_bytes_follow_the_bucket(bucket: Bucket) -> None:
    """Objects are put, replaced and deleted behind the mount's back; a refresh shows them."""
    bucket.put("seed", b"seed")
    mounted = bucket.mount()

    class Model(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.files = {"seed": b"seed"}
            for name in list(tree_of(mounted.path)):
                if name != "seed":
                    bucket.s3.delete(f"models/{bucket.prefix}/{name}")

        @rule(name=st.sampled_from(NAMES), size=st.integers(0, 3 * MIB), seed=st.integers(0, 5))
        def put(self, name: str, size: int, seed: int) -> None:
            self.files[name] = bucket.put(name, random_bytes(size, f"{name}{seed}"))

        @rule(name=st.sampled_from(NAMES))
        def delete(self, name: str) -> None:
            if self.files.pop(name, None) is not None:
                bucket.s3.delete(f"models/{bucket.prefix}/{name}")

        @invariant()
        def same(self) -> None:
            mounted.refresh()
            assert tree_of(mounted.path) == self.files

    budget = hypothesis_settings(max_examples=3, stateful_step_count=6, deadline=None)
    run_state_machine_as_test(Model, settings=budget)


# Mappings are touched in processes of their own: a page fault holds Python's interpreter lock, and
# the proxy that has to bring the page runs in this process.

_FSX = """
import mmap, os, random, sys
path, native, seed = sys.argv[1], open(sys.argv[2], "rb").read(), int(sys.argv[3])
rng = random.Random(seed)
plain, direct = os.open(path, os.O_RDONLY), os.open(path, os.O_RDONLY | os.O_DIRECT)
page = mmap.mmap(-1, 2 << 20)
view = mmap.mmap(plain, 0, prot=mmap.PROT_READ)
for _ in range(400):
    at = rng.randrange(len(native) + 5000)
    count = rng.choice((1, 4096, 70_000, 1 << 20, 1_500_000))
    way = rng.choice(("pread", "mmap", "direct", "readv"))
    if way == "pread":
        got = os.pread(plain, count, at)
    elif way == "mmap":
        got = view[at : at + count]
    elif way == "readv":
        parts = [bytearray(count // 2), bytearray(count - count // 2)]
        count_read = os.preadv(plain, parts, at)
        got = b"".join(parts)[:count_read]
    else:
        at, count = at // 4096 * 4096, -(-count // 4096) * 4096
        got = page[: os.preadv(direct, [memoryview(page)[:count]], at)]
    assert got == native[at : at + count], (way, at, count)
emit("same")
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_r2_r3_random_reads_and_mappings_equal_the_native_file(
    bucket: Bucket, tmp_path: Path, seed: int
) -> None:
    """fsx's reading half: pread, readv, mmap and O_DIRECT at random, while the file fills."""
    data = bucket.put("w.safetensors", random_bytes(20 * MIB + 12345, f"r3-{seed}"))
    (tmp_path / "native").write_bytes(data)
    mounted = bucket.mount()
    path = mounted.path / "w.safetensors"
    assert run_python(_FSX, path, tmp_path / "native", seed, timeout_s=100).value == "same"
    assert mounted.complete("w.safetensors")
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(data).digest()


_STORM = """
import mmap, os, random, sys
root, native, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
files = {name: open(native + "/" + name, "rb").read() for name in os.listdir(native)}
rng = random.Random(seed)
complete = 0
while complete < 200:
    name = rng.choice(list(files))
    at = rng.randrange(len(files[name]) - 8192)
    state = os.getxattr(root + "/" + name, "user.weightstream.state")
    complete += state == b"complete"
    with open(root + "/" + name, "rb", buffering=0) as file:
        if rng.random() < 0.5:
            got = os.pread(file.fileno(), 8192, at)
        else:
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                got = view[at : at + 8192]
    assert got == files[name][at : at + 8192], (name, at, state, got == bytes(8192))
emit("same")
"""


def test_r13_r35_no_hole_and_no_error_while_files_become_complete(
    bucket: Bucket, tmp_path: Path
) -> None:
    """A storm of opens, reads and mappings over the moments when files become complete."""
    native = tmp_path / "native"
    native.mkdir()
    for i in range(4):
        data = bucket.put(f"s{i}.bin", random_bytes(8 * MIB + i, f"storm-{i}"))
        (native / f"s{i}.bin").write_bytes(data)
    bucket.proxy.add(f.When(key=".bin", ranged=True, times=None), f.Drip(8e6))
    mounted = bucket.mount()
    with ExitStack() as stack:
        storms = [
            stack.enter_context(start_python(_STORM, mounted.path, native, seed))
            for seed in range(4)
        ]
        for storm in storms:
            assert storm.result(100).value == "same"


def test_r25_ranks_that_share_a_file_fetch_it_once(bucket: Bucket) -> None:
    """Processes of their own, children that share one open file, and a fork after mmap."""
    data = bucket.put("w.safetensors", random_bytes(24 * MIB, "r25"))
    mounted = bucket.mount()
    code = """
import hashlib, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
view = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
size = len(view)
half = size // 2
pid = os.fork()
mine = (half, size) if pid == 0 else (0, half)
digest = hashlib.sha256(view[mine[0]:mine[1]]).hexdigest()
if pid == 0:
    os.write(1, (digest + "\\n").encode())
    os._exit(0)
os.waitpid(pid, 0)
print(digest)
"""
    command = [sys.executable, "-c", code, str(mounted.path / "w.safetensors")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    expected = {hashlib.sha256(half).hexdigest() for half in (data[: 12 * MIB], data[12 * MIB :])}
    for rank in ranks:
        out, _ = rank.communicate(timeout=100)
        assert set(out.split()) == expected
    assert mounted.complete("w.safetensors")
    assert bucket.sent("w.safetensors") <= 1.05 * len(data)


def test_a_second_mount_and_the_loader_share_what_was_fetched(bucket: Bucket) -> None:
    data = bucket.put("w.bin", random_bytes(4 * MIB, "shared"))
    first, second = bucket.mount(), bucket.mount()
    assert (first.path / "w.bin").read_bytes() == data
    assert first.complete("w.bin")
    assert (second.path / "w.bin").read_bytes() == data
    assert bucket.sent("w.bin") == len(data)
    code = "import os, sys; emit(os.getxattr(sys.argv[1], 'user.weightstream.cached').decode())"
    assert run_python(code, second.path / "w.bin", env=bucket.env).value == str(len(data))
