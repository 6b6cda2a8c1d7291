"""The process that works on files reads them all, whatever the way; its messages survive JSON."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from weightstream.bench.mounts import family
from weightstream.bench.mounts.bucket import make_bucket
from weightstream.bench.mounts.private import file_system_at
from weightstream.bench.mounts.sums import checksum
from weightstream.bench.mounts.tasks import Done, Task, Work
from weightstream.demo.processes import Child


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("files")
    paths = tuple(folder / name for name in ("a", "b"))
    for path in paths:
        path.write_bytes(os.urandom(3_000_001))
    return paths


def work(task: Task, tmp_path: Path) -> tuple[Done, str]:
    """Run the process through its protocol."""
    command = (sys.executable, "-m", "weightstream.bench.mounts.work", task.to_json())
    with Child(command, dict(os.environ), tmp_path / "stderr") as child:
        child.expect("ready", 60)
        child.say("go")
        done = Done.from_json(child.expect("{", 60))
        child.say("sum")
        digest = child.expect("sum", 60)
        child.wait(60)
    return done, digest.removeprefix("sum").strip()


@pytest.mark.parametrize("way", ["read", "map", "threads", "hold"])
def test_every_way_reads_all_bytes(way: Work, files: tuple[Path, ...], tmp_path: Path) -> None:
    done, digest = work(Task(way, tuple(map(str, files)), passes=2), tmp_path)
    assert (done.size_bytes, done.count) == (6_000_002, 2)
    assert 0 < done.first_s <= done.wall_s * 3
    assert digest == checksum(files)


def test_list_counts_lines(files: tuple[Path, ...], tmp_path: Path) -> None:
    done, digest = work(Task("find", folder=str(files[0].parent)), tmp_path)
    assert (done.count, digest) == (2, "")


def test_checksum_knows_names_sizes_and_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "1" / "a", tmp_path / "2" / "a"
    for path, data in ((first, b"abc"), (second, b"abd")):
        path.parent.mkdir()
        path.write_bytes(data)
    assert checksum([first]) != checksum([second])
    second.write_bytes(b"abc")
    assert checksum([first]) == checksum([second])
    assert checksum([]) == ""


def test_messages_survive_json() -> None:
    task = Task("read", ("a", "b"), "c", 3)
    assert Task.from_json(task.to_json()) == task
    done = Done(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert Done.from_json(json.dumps(asdict(done))) == done


def test_family_is_this_process_and_its_children(tmp_path: Path) -> None:
    with Child(("sleep", "60"), dict(os.environ), tmp_path / "stderr"):
        found = family.family(os.getpid())
    assert os.getpid() in found
    assert len(found) >= 2
    assert family.peak_rss_bytes((os.getpid(),)) > 1 << 20
    assert family.cpu_s((os.getpid(),)) > 0
    assert family.family(1 << 30) == ()
    assert family.cpu_s((1 << 30,)) == family.peak_rss_bytes((1 << 30,)) == 0


def test_file_system_at_takes_the_topmost_of_exactly_this_directory() -> None:
    line = "36 35 98:0 / /mnt/a\\040b rw,noatime shared:1 - {} server rw"
    mountinfo = "\n".join(line.format(kind) for kind in ("ext4", "fuse.rclone"))
    assert file_system_at(Path("/mnt/a b"), mountinfo) == "fuse.rclone"
    assert file_system_at(Path("/mnt"), mountinfo) == ""


def test_bucket_is_made_once(tmp_path: Path) -> None:
    bucket = make_bucket(tmp_path / "bench", 4 << 20)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert make_bucket(tmp_path / "bench", 4 << 20) == bucket
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(bucket.names("shards")) == 4
    assert len(bucket.names("many")) == 500
    assert bucket.names("tree") == ()
    copy = bucket.paths(bucket.names("whole"), bucket.natives)
    assert checksum(copy) == checksum(bucket.paths(bucket.names("whole")))
