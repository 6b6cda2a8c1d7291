"""Backing ids: one per node while it is open, known to the next server."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import LogWatch

from weightstream.cachefs.fuse.kernel import device
from weightstream.cachefs.fuse.kernel.journal import Journal
from weightstream.cachefs.fuse.kernel.passthrough import Passthrough


class FakeDevice:
    """A kernel that gives out ids."""

    def __init__(self) -> None:
        self.last = 0
        self.open: set[int] = set()
        self.error = 0

    def backing_open(self, fuse: int, fd: int) -> int:
        os.fstat(fd)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.last += 1
        self.open.add(self.last)
        return self.last

    def backing_close(self, fuse: int, backing_id: int) -> None:
        if backing_id not in self.open:
            raise OSError(errno.ENOENT, "no such id")
        self.open.remove(backing_id)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(device, "backing_open", fake.backing_open)
    monkeypatch.setattr(device, "backing_close", fake.backing_close)
    return fake


@pytest.fixture
def make(tmp_path: Path, kernel: FakeDevice) -> Callable[[], Passthrough]:
    def made() -> Passthrough:
        passthrough = Passthrough(-1, Journal(tmp_path / "mount.opens"))
        passthrough.enabled = True
        return passthrough

    return made


def data() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def test_one_id_while_it_is_open(kernel: FakeDevice, make: Callable[[], Passthrough]) -> None:
    passthrough = make()
    passthrough.begin()
    assert passthrough.open(10, 1, data) == passthrough.open(12, 1, data) == 1
    assert passthrough.open(14, 3, data) == 2
    assert len(passthrough) == 2
    passthrough.release(10)
    passthrough.release(10)
    passthrough.release(999)
    assert kernel.open == {1, 2}
    passthrough.release(12)
    assert kernel.open == {2}
    assert not passthrough.is_open(1)
    assert passthrough.open(16, 1, data) == 3


def test_a_file_that_was_evicted_has_none(make: Callable[[], Passthrough]) -> None:
    passthrough = make()
    passthrough.begin()
    assert passthrough.open(10, 1, lambda: None) is None
    assert not passthrough.is_open(1)
    assert passthrough.allows(1)


def test_the_next_server_goes_on_with_the_ids(
    kernel: FakeDevice, make: Callable[[], Passthrough]
) -> None:
    first = make()
    first.begin()
    for handle, nodeid in ((10, 1), (12, 1), (14, 3), (16, 5)):
        first.open(handle, nodeid, data)
    first.release(10)
    first.release(14)  # and so id 2
    first.open(18, 3, data)
    second = make()
    assert second.load() == {12: 1, 16: 5, 18: 3}
    assert second.open(20, 1, data) == 1
    assert second.open(22, 3, data) == 4
    assert kernel.open == {1, 3, 4}
    for handle in (12, 16, 18, 20, 22):
        second.release(handle)
    assert kernel.open == set()


def test_an_open_that_two_servers_work_on_is_one_handle(
    kernel: FakeDevice, make: Callable[[], Passthrough]
) -> None:
    first = make()
    first.begin()
    first.open(10, 1, data)
    second = make()
    second.load()
    second.open(10, 1, data)
    second.release(10)
    assert kernel.open == set()


def test_killed_before_the_id_was_given_back(
    kernel: FakeDevice, make: Callable[[], Passthrough], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make()
    first.begin()
    first.open(10, 1, data)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(device, "backing_close", killed)
        with pytest.raises(KeyboardInterrupt):
            first.release(10)
    second = make()
    assert second.load() == {}
    assert kernel.open == set()


@pytest.mark.parametrize(
    ("number", "still_enabled"),
    [(errno.EPERM, False), (errno.ENOTTY, False), (errno.ENOMEM, True), (errno.ELOOP, True)],
)
def test_what_the_kernel_refuses_is_read_through_the_server(
    kernel: FakeDevice,
    make: Callable[[], Passthrough],
    expect_log: LogWatch,
    number: int,
    still_enabled: bool,
) -> None:
    expect_log("no passthrough")
    passthrough = make()
    passthrough.begin()
    kernel.error = number
    assert passthrough.open(10, 1, data) is None
    assert not passthrough.allows(1)
    assert passthrough.allows(3) is still_enabled


def test_the_journal_stays_short(
    kernel: FakeDevice, make: Callable[[], Passthrough], tmp_path: Path
) -> None:
    passthrough = make()
    passthrough.begin()
    passthrough.open(1, 7, data)
    for handle in range(2, 12_000):
        passthrough.open(handle, 7, data)
        passthrough.release(handle)
    assert (tmp_path / "mount.opens").read_bytes().count(b"\n") < 11_000
    assert make().load() == {1: 7}
    assert kernel.open == {1}
