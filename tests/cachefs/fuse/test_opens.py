"""Handles: what is counted, by which server, and what becomes of opens that fail."""

import errno
import os
import struct
from pathlib import Path

import pytest
from tests.cachefs.fuse.scenes import Fakes, fakes

from weightstream.cachefs.fuse.kernel import device, wire
from weightstream.cachefs.fuse.kernel.connection import Refusal
from weightstream.cachefs.fuse.kernel.journal import Journal
from weightstream.cachefs.fuse.kernel.names import Names
from weightstream.cachefs.fuse.kernel.nodes import Nodes
from weightstream.cachefs.fuse.kernel.opens import Opens
from weightstream.cachefs.fuse.kernel.passthrough import Passthrough
from weightstream.cachefs.fuse.kernel.protocol import Op, Open
from weightstream.cachefs.fuse.kernel.wire import Request


class Driver:
    """The parts that open files, over fakes."""

    def __init__(self, root: Path, scene: Fakes, resumed: bool = False) -> None:
        self.scene = scene
        self.nodes = Nodes(Journal(root / "m.nodes"))
        self.passthrough = Passthrough(-1, Journal(root / "m.opens"))
        self.passthrough.enabled = True
        tree, content = scene.tree, scene.content
        self.names = Names(tree, content, self.nodes, self.passthrough.allows)  # type: ignore[arg-type]
        self.opens = Opens(tree, content, self.nodes, self.names, self.passthrough)  # type: ignore[arg-type]
        if resumed:
            self.nodes.load()
            self.opens.adopt(self.passthrough.load())
        else:
            self.nodes.begin()
            self.passthrough.begin()

    def look_up(self, path: str) -> int:
        entry = self.scene.tree.files[path]
        (node,) = self.nodes.look_up([(self.names.identify(entry), entry)])
        return node.id

    def open(
        self, nodeid: int, unique: int = 2, flags: int = 0, pid: int = 9
    ) -> tuple[int, int, int]:
        """Return (handle, flags, backing id); undo what fails, as the server does."""
        request = Request(
            Op.OPEN, unique, nodeid, 0, 0, pid, struct.pack("=II", os.O_RDONLY | flags, 0)
        )
        self.opens.check(request)
        try:
            (packed,) = self.opens.open(request)
        except Refusal:
            self.opens.undo(request)
            raise
        handle, open_flags, backing_id = struct.unpack("=QIi", packed)
        return handle, open_flags, backing_id


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    ids = iter(range(1, 1000))
    monkeypatch.setattr(device, "backing_open", lambda fuse, fd: next(ids))
    monkeypatch.setattr(device, "backing_close", lambda fuse, backing_id: None)
    return fakes(str(tmp_path / "store"), {"a": 10, "b": [10, "1", True], "none": [10, ""]})


@pytest.fixture
def driver(tmp_path: Path, scene: Fakes) -> Driver:
    return Driver(tmp_path, scene)


def stale(driver: Driver, nodeid: int, **given: int) -> bool:
    try:
        driver.open(nodeid, **given)
    except Refusal as refusal:
        return refusal.errno == errno.ESTALE
    return False


def test_how_files_are_opened(driver: Driver) -> None:
    assert driver.open(driver.look_up("a"), 2) == (2, Open.KEEP_CACHE | Open.NOFLUSH, 0)
    assert driver.open(driver.look_up("a"), 4, os.O_DIRECT) == (
        4, Open.DIRECT_IO | Open.NOFLUSH, 0,
    )  # fmt: skip
    assert driver.open(driver.look_up("b"), 6) == (6, Open.PASSTHROUGH | Open.NOFLUSH, 1)
    assert driver.open(driver.look_up("none"), 8) == (8, Open.NOFLUSH, 0)
    assert driver.scene.opens() == {"a": 2, "b": 1, "none": 1}
    for handle in (2, 4, 6, 8):
        driver.opens.close(handle)
    assert driver.scene.opens() == {}


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_TRUNC, 3])
@pytest.mark.parametrize("name", ["a", "b"])
def test_writing_is_refused_before_anything_is_opened(
    driver: Driver, name: str, flags: int
) -> None:
    with pytest.raises(Refusal) as caught:
        driver.open(driver.look_up(name), flags=flags)
    assert caught.value.errno == errno.EROFS
    assert driver.scene.opens() == {}
    assert len(driver.passthrough) == 0


def test_folders_and_unknown_nodes(driver: Driver) -> None:
    for nodeid, number in ((wire.ROOT_ID, errno.EISDIR), (12345, errno.ESTALE)):
        with pytest.raises(Refusal) as caught:
            driver.open(nodeid)
        assert caught.value.errno == number


def test_an_open_at_the_wrong_node_is_sent_back_once(driver: Driver) -> None:
    nodeid = driver.look_up("a")
    driver.scene.complete("a")
    assert stale(driver, nodeid, pid=9)
    assert driver.scene.opens() == {}
    assert driver.open(nodeid, pid=9)[2] == 0  # it comes by no path
    assert stale(driver, nodeid, pid=9)
    assert stale(driver, nodeid, pid=10)
    assert driver.open(driver.look_up("a"), unique=4, pid=10)[2] == 1


def test_a_replaced_version_is_sent_back_once(driver: Driver) -> None:
    driver.scene.tree.children("")
    for name in ("a", "b"):
        nodeid = driver.look_up(name)
        driver.scene.put(name, 10, "2")
        assert stale(driver, nodeid)
        assert not stale(driver, nodeid)


def test_what_lies_in_memory_is_passed_through_once_it_was_read(driver: Driver) -> None:
    in_memory = driver.scene.content.in_memory
    in_memory.add(driver.scene.tree.files["b"].blob.id)
    nodeid = driver.look_up("b")
    assert driver.open(nodeid, 2) == (2, Open.KEEP_CACHE | Open.NOFLUSH, 0)
    in_memory.clear()
    assert stale(driver, nodeid)
    assert driver.open(driver.look_up("b"), 4) == (4, Open.PASSTHROUGH | Open.NOFLUSH, 1)


def test_an_evicted_file_is_stale_until_it_is_looked_up(driver: Driver) -> None:
    nodeid = driver.look_up("b")
    driver.scene.evict("b")
    assert stale(driver, nodeid)
    assert stale(driver, nodeid)
    assert driver.scene.opens() == {}
    assert driver.open(driver.look_up("b"))[2] == 0


def test_the_next_server_counts_what_is_open(tmp_path: Path, driver: Driver) -> None:
    nodeid = driver.look_up("b")
    driver.open(nodeid, 2)
    driver.open(nodeid, 4)
    driver.scene.content.opens.clear()  # it is in another process
    second = Driver(tmp_path, driver.scene, resumed=True)
    assert second.scene.opens() == {"b": 2}
    # The second open is asked again: its answer had not been written.
    assert second.open(nodeid, 4 | wire.RESENT) == (4, Open.PASSTHROUGH | Open.NOFLUSH, 1)
    assert second.scene.opens() == {"b": 2}
    for handle in (2, 4):
        second.opens.close(handle)
    assert second.scene.opens() == {}
    assert len(second.passthrough) == 0


def test_many_threads_that_are_sent_back_and_never_come_again(driver: Driver) -> None:
    nodeid = driver.look_up("a")
    driver.scene.complete("a")
    assert all(stale(driver, nodeid, pid=pid) for pid in range(10_000))
    assert len(driver.opens._sent_back) < 5000
