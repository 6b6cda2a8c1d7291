"""Node ids, lookup counts, and what the next server knows of them."""

import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import LogWatch

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.files.entries import Entry, File, Folder
from weightstream.cachefs.fuse.kernel.journal import Journal
from weightstream.cachefs.fuse.kernel.nodes import (
    NodeError,
    Nodes,
    file_id,
    file_ino,
    folder_id,
    folder_ino,
)
from weightstream.cachefs.fuse.kernel.wire import ROOT_ID


def made_file(path: str, version: str = "1", size: int = 10, modified_ns: int = 5) -> File:
    return File(path, Blob(f"s3://bucket/{path}", size, version), modified_ns)


def id_of(entry: Entry, complete: bool = False) -> int:
    if isinstance(entry, Folder):
        return folder_id(entry.path)
    return file_id(file_ino(entry.path, entry.blob.id), complete)


def looked_up(nodes: Nodes, *entries: Entry) -> list[int]:
    return [node.id for node in nodes.look_up([(id_of(entry), entry) for entry in entries])]


def test_ids_are_made_of_path_version_and_state() -> None:
    a, same, other = made_file("a"), made_file("a"), made_file("a", "2")
    assert id_of(a) == id_of(same)
    assert (
        len({id_of(a), id_of(a, True), id_of(other), id_of(Folder("a")), id_of(made_file("b"))})
        == 5
    )
    assert id_of(a) >> 1 == id_of(a, True) >> 1 == file_ino("a", a.blob.id)


def test_ids_do_not_change_from_release_to_release() -> None:
    """A server of another version must know them."""
    assert folder_id("") == ROOT_ID
    assert folder_ino("llama") == 2989059413943343326
    assert file_ino("llama/a.bin", "0" * 32) == 2603681761653998207


@given(st.text(), st.text())
def test_ids_fit_and_are_none_of_the_special_ones(path: str, blob_id: str) -> None:
    for ino in (file_ino(path, blob_id), folder_ino(path + "x")):
        assert 1 < ino < 1 << 62
        assert 1 < file_id(ino, True) < 1 << 63


def test_nodes_live_as_long_as_the_kernel_knows_them() -> None:
    nodes = Nodes(Journal(None))
    nodes.begin()
    a = made_file("a")
    nodeid, again = looked_up(nodes, a, a)
    assert nodeid == again
    nodes.forget(nodeid, 1)
    node = nodes.get(nodeid)
    assert node is not None
    assert node.entry == a
    nodes.forget(nodeid, 1)
    assert nodes.get(nodeid) is None
    nodes.forget(nodeid, 1)
    nodes.forget(ROOT_ID, 100)
    assert nodes.get(ROOT_ID) is not None


def test_two_entries_of_one_id_are_an_error() -> None:
    nodes = Nodes(Journal(None))
    nodes.look_up([(100, made_file("a"))])
    for other in (made_file("b"), made_file("a", "2"), Folder("a")):
        with pytest.raises(NodeError):
            nodes.look_up([(100, other)])
    nodes.look_up([(100, made_file("a", modified_ns=9))])
    node = nodes.get(100)
    assert node is not None
    assert isinstance(node.entry, File)
    assert node.entry.modified_ns == 9


def test_files_that_fill_are_told_of_once() -> None:
    nodes = Nodes(Journal(None))
    a = made_file("a")
    looked_up(nodes, a)
    nodes.watch(a.blob.id, a)
    assert nodes.completed(a.blob.id) == a
    assert nodes.completed(a.blob.id) is None
    nodes.watch(a.blob.id, a)
    nodes.forget(id_of(a), 1)
    assert nodes.completed(a.blob.id) is None


def test_the_next_server_knows_what_was_given_out(tmp_path: Path) -> None:
    path = tmp_path / "mount.nodes"
    entries: list[Entry] = [
        made_file("f/a", "1"), made_file("f/a", "2"), made_file("\u00fc \n\"'\\", "W/\"x\""),
        Folder("f"), Folder("f/g"),
    ]  # fmt: skip
    first = Nodes(Journal(path))
    first.begin()
    ids = looked_up(first, *entries)
    first.look_up([(id_of(entries[0], True), entries[0])])
    first.forget(ids[0], 1)
    second = Nodes(Journal(path))
    second.load()
    for nodeid, entry in zip(ids, entries, strict=True):
        node = second.get(nodeid)
        assert node is not None
        assert node.entry == entry
    # How often they were looked up is not known, so they are never dropped.
    second.forget(ids[1], 1)
    assert second.get(ids[1]) is not None
    assert second.completed(made_file("f/a", "1").blob.id) == entries[0]
    third = Nodes(Journal(path))
    third.begin()
    assert len(third) == 1
    assert path.stat().st_size == 0


def test_a_node_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "mount.nodes"
    nodes = Nodes(Journal(path))
    nodes.begin()
    for _ in range(5):
        (nodeid,) = looked_up(nodes, made_file("a"))
        nodes.forget(nodeid, 1)
    assert path.read_bytes().count(b"\n") == 1
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "garbage",
    [
        b'[1,"cut',
        b"\xff\xfe\n",
        b"null\n",
        b'{"a":1}\n',
        b"[[1]]\n",
        b"[1]\n",
        b'["x","y"]\n',
        b"\n",
    ],
)
def test_what_makes_no_sense_is_left_out(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "mount.nodes"
    first = Nodes(Journal(path))
    first.begin()
    looked_up(first, made_file("a"))
    with path.open("ab") as file:
        file.write(garbage)
    second = Nodes(Journal(path))
    second.load()
    looked_up(second, made_file("b"))
    third = Nodes(Journal(path))
    third.load()
    assert third.get(id_of(made_file("a"))) is not None
    assert third.get(id_of(made_file("b"))) is not None
    assert len(third) == 3


def test_without_a_journal_that_can_be_written_the_server_goes_on(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log("open files will be ESTALE")
    nodes = Nodes(Journal(tmp_path / "missing" / "mount.nodes"))
    nodes.begin()
    assert nodes.get(looked_up(nodes, made_file("a"))[0]) is not None


def test_a_full_disk_is_said_once(expect_log: LogWatch) -> None:
    expect_log("open files will be ESTALE")
    journal = Journal(Path("/dev/full"))
    journal.begin()
    for i in range(3):
        journal.append([(i, "x")])
    assert len(expect_log.messages()) == 1


def test_a_journal_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "mount.opens"
    journal = Journal(path)
    journal.begin()
    journal.append([(i,) for i in range(100)])
    journal.replace([(1, 2, 3)])
    journal.append([(4,)])
    assert path.read_text() == "[1,2,3]\n[4]\n"
    assert journal.length == 2
    assert os.listdir(tmp_path) == ["mount.opens"]
    again = Journal(path)
    assert again.load() == [[1, 2, 3], [4]]
    for one in (journal, again):
        one.close()


def test_many_threads_look_up_and_forget(tmp_path: Path) -> None:
    nodes = Nodes(Journal(tmp_path / "mount.nodes"))
    nodes.begin()
    files = [made_file(f"f/{i}") for i in range(20)]

    def work() -> None:
        for _ in range(50):
            for nodeid in looked_up(nodes, *files):
                nodes.forget(nodeid, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(nodes) == 1
