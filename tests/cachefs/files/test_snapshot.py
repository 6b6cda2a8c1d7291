"""The tree's folders on disk."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from tests.cachefs.files.conftest import Planted
from tests.conftest import LogWatch

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.files.entries import Entry, File, Folder, join
from weightstream.cachefs.files.names import flaw
from weightstream.cachefs.files.snapshot import LINE_ENTRIES, Snapshot, decode, encode

Until = Callable[[Callable[[], bool]], None]
URI = "s3://bucket/root"

names = st.text(min_size=1, max_size=8).filter(lambda name: not flaw(name))


@st.composite
def trees(draw: st.DrawFn) -> dict[str, tuple[Entry, ...]]:
    found: dict[str, tuple[Entry, ...]] = {}
    for path in draw(st.lists(st.lists(names, max_size=3).map("/".join), unique=True, max_size=4)):
        entries: list[Entry] = []
        for name in sorted(draw(st.sets(names, max_size=5))):
            uri = draw(st.sampled_from([f"{URI}/{join(path, name)}", f"s3://other/{name}"]))
            blob = Blob(uri, draw(st.integers(0, 1 << 62)), draw(st.text(max_size=5)))
            file = File(join(path, name), blob, draw(st.integers(0, 1 << 62)))
            entries.append(file if draw(st.booleans()) else Folder(join(path, name)))
        found[path] = tuple(entries)
    return found


@given(trees())
def test_what_is_written_is_read(folders: dict[str, tuple[Entry, ...]]) -> None:
    content = encode(list(folders.items()), URI, web=False)
    assert decode(content, URI, web=False) == folders


def test_names_of_the_web() -> None:
    file = File("a b/ü.bin", Blob("http://h/x/a%20b/%C3%BC.bin", 5, "v"), 1)
    content = encode([("a b", (file,))], "http://h/x", web=True)
    assert decode(content, "http://h/x", web=True) == {"a b": (file,)}


def test_long_folders_are_lines() -> None:
    many = tuple(Folder(f"f{i:05}") for i in range(2 * LINE_ENTRIES + 1))
    content = encode([("", many), ("f00000", ())], URI, web=False)
    assert len(content.splitlines()) == 1 + 3 + 1
    assert decode(content, URI, web=False) == {"": many, "f00000": ()}


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_flipped_byte_is_found_out(at: int, value: int) -> None:
    content = bytearray(encode([("", tuple(Folder(f"f{i}") for i in range(30)))], URI, web=False))
    at %= len(content)
    if content[at] == value:
        return
    content[at] = value
    try:
        found = decode(bytes(content), URI, web=False)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return
    assert found == decode(
        encode([("", tuple(Folder(f"f{i}") for i in range(30)))], URI, False), URI, False
    )


def sealed(body: bytes, **head: object) -> bytes:
    first = {"weightstream_tree": 1, "uri": URI, "blake3": blake3(body).hexdigest()} | head
    return json.dumps(first).encode() + b"\n" + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"garbage",
        b"[]\n",
        b'"x"\n',
        b"null",
        b"\xff\xfe\n",
        b"[" * 100_000,
        sealed(b'["",[["a"]]]\n')[:-3],
        sealed(b'["",[["a"]]]\n') + b" ",
        sealed(b'["",[["a"]]]\n', weightstream_tree=2),
        sealed(b'["",[["a"]]]\n', uri="s3://other"),
        sealed(b"{}\n"),
        sealed(b"[1,[]]\n"),
        sealed(b'["",[[]]]\n'),
        sealed(b'["",[[".."]]]\n'),
        sealed(b'["..",[["a"]]]\n'),
        sealed(b'["",[["a/b"]]]\n'),
        sealed(b'["",[["a",-1,"v",0]]]\n'),
        sealed(b'["",[["a",1.5,"v",0]]]\n'),
        sealed(b'["",[["a",1,null,0]]]\n'),
        sealed(b'["",[["a",1,"v",0,7]]]\n'),
        sealed(b'["",[["a",1]]]\n'),
    ],
)
def test_garbage_is_no_snapshot(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(content)
    snapshot = Snapshot(path, URI, False, list)
    assert snapshot.load() == {}
    snapshot.close()
    assert path.read_bytes() == content


def test_no_file_and_no_permission(tmp_path: Path) -> None:
    assert Snapshot(tmp_path / "none", URI, False, list).load() == {}
    assert Snapshot(tmp_path, URI, False, list).load() == {}  # a directory


def test_a_good_one_in_spite_of_all_that(tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(sealed(b'["",[["a"],["b",1,"v",9]]]\n'))
    assert Snapshot(path, URI, False, list).load() == {
        "": (Folder("a"), File("b", Blob(f"{URI}/b", 1, "v"), 9))
    }


# When it is written.


def test_the_first_change_is_saved_at_once_and_the_rest_later(tmp_path: Path, until: Until) -> None:
    path, saves = tmp_path / "new" / "snapshot", [0]

    def collect() -> list[tuple[str, tuple[Entry, ...]]]:
        saves[0] += 1
        return [("", (Folder(f"save{saves[0]}"),))]

    snapshot = Snapshot(path, URI, False, collect, interval_s=3600.0)
    snapshot.touch()
    until(path.exists)
    assert decode(path.read_bytes(), URI, False) == {"": (Folder("save1"),)}
    for _ in range(50):
        snapshot.touch()
    time.sleep(0.02)
    assert saves == [1]
    snapshot.close()
    assert decode(path.read_bytes(), URI, False) == {"": (Folder("save2"),)}
    assert saves == [2]
    assert os.listdir(path.parent) == ["snapshot"]
    assert path.stat().st_mode & 0o777 == 0o600
    snapshot.close()
    assert saves == [2]


def test_nothing_changed_nothing_saved(planted: Planted) -> None:
    planted.look("", "llama")
    planted.restarted()
    written = planted.snapshot_path.stat().st_mtime_ns
    assert planted.tree.refresh() == 2
    planted.clock.now_s += 60.0
    planted.names()
    planted.restarted()
    assert planted.snapshot_path.stat().st_mtime_ns == written


def test_a_tree_that_is_killed_has_saved_what_it_showed(planted: Planted, until: Until) -> None:
    planted.names()
    until(planted.snapshot_path.exists)
    found = decode(planted.snapshot_path.read_bytes(), planted.tree.uri, False)
    assert found == {"": planted.tree.children("")}


def test_a_disk_that_takes_nothing_is_one_warning(
    tmp_path: Path, expect_log: LogWatch, until: Until
) -> None:
    expect_log("cannot keep what was listed")
    (tmp_path / "file").write_bytes(b"")
    calls: list[int] = []

    def collect() -> list[tuple[str, tuple[Entry, ...]]]:
        calls.append(1)
        return []

    path = tmp_path / "folder" / "snapshot"
    path.mkdir(parents=True)  # cannot be replaced by a file
    snapshot = Snapshot(path, URI, False, collect, interval_s=0.0)
    snapshot.touch()
    until(lambda: len(calls) == 1)
    snapshot.touch()
    until(lambda: len(calls) == 2)
    snapshot.close()
    assert len(expect_log.messages("cannot keep what was listed")) == 1
    path.rmdir()
    snapshot = Snapshot(path, URI, False, collect)
    snapshot.touch()
    snapshot.close()
    assert path.is_file()
    assert os.listdir(path.parent) == ["snapshot"]


def test_a_folder_of_100000_files(planted: Planted, until: Until) -> None:
    """Measured: 0.6 s to load, 10 MB; a bound that only something quadratic would miss."""
    planted.origin.files = {f"many/file-{i:06}.safetensors": "v1" for i in range(100_000)}
    before = planted.tree.children("many")
    assert len(before) == 100_000
    started_s = time.monotonic()
    tree = planted.restarted()
    assert sum(1 for _ in tree.known()) == 100_000
    assert time.monotonic() - started_s < 20.0
    assert planted.snapshot_path.stat().st_size < 20 << 20
    entry = tree.entry("many/file-050000.safetensors")
    assert entry == before[50_000]
    assert planted.told() == []
