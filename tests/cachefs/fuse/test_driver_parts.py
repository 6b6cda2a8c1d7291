"""The small parts of the kernel driver: answers, requests that wait, threads, INIT."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cachefs.fuse.harness import until
from tests.cachefs.fuse.scenes import fakes
from tests.conftest import LogWatch

from weightstream import metrics
from weightstream.cachefs.files.entries import Change, Entry, Folder
from weightstream.cachefs.fuse.kernel import handshake, wire
from weightstream.cachefs.fuse.kernel.connection import Connection, Refusal
from weightstream.cachefs.fuse.kernel.extras import is_foreign
from weightstream.cachefs.fuse.kernel.handshake import Negotiated
from weightstream.cachefs.fuse.kernel.notifier import Listing, Notifier
from weightstream.cachefs.fuse.kernel.protocol import Init, Notify, Op
from weightstream.cachefs.fuse.kernel.server import KernelServer, Options
from weightstream.cachefs.fuse.kernel.waiting import Deferred, Waiting
from weightstream.cachefs.fuse.kernel.wire import OUT, Offer
from weightstream.cachefs.fuse.kernel.workers import Children, Listings, Workers
from weightstream.errors import NotFoundError, UnavailableError, WeightstreamError


class Wire:
    """A pipe in the kernel's place: each answer is one message."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)  # packets
        self.connection = Connection(self._in)

    def hear(self) -> tuple[int, int, bytes]:
        """Return (error, unique, payload) of the next message."""
        message = os.read(self._out, 1 << 16)
        length, error, unique = OUT.unpack_from(message)
        assert length == len(message)
        return error, unique, message[OUT.size :]

    def hears(self) -> int:
        """Return how many messages wait to be read."""
        os.set_blocking(self._out, False)
        count = 0
        while True:
            try:
                os.read(self._out, 1 << 16)
            except BlockingIOError:
                os.set_blocking(self._out, True)
                return count
            count += 1

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)


@pytest.fixture
def kernel() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def errors(name: str) -> float:
    value = metrics.FUSE_ERRORS.labels(name)._value.get()
    return float(value)


# ---- answers


def test_an_answer_is_one_message(kernel: Wire) -> None:
    assert kernel.connection.reply(6, [b"ab", memoryview(b"cdef")[1:]])
    assert kernel.hear() == (0, 6, b"abdef")
    assert kernel.connection.reply(8)
    assert kernel.hear() == (0, 8, b"")
    kernel.connection.say_unsupported(10)
    assert kernel.hear() == (-errno.EOPNOTSUPP, 10, b"")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (Refusal(errno.EROFS), errno.EROFS),
        (NotFoundError("gone"), errno.ENOENT),
    ],
)
def test_an_error_is_its_number(kernel: Wire, error: WeightstreamError, number: int) -> None:
    before = errors(errno.errorcode[number])
    kernel.connection.refuse(6, Op.LOOKUP, "x", error)
    assert kernel.hear() == (-number, 6, b"")
    assert errors(errno.errorcode[number]) == before + 1


def test_input_output_errors_are_logged_but_not_a_thousand_times(
    kernel: Wire, expect_log: LogWatch
) -> None:
    expect_log("read of a.bin: the origin is silent")
    before = errors("EIO")
    for unique in range(0, 100, 2):
        kernel.connection.refuse(unique, Op.READ, "a.bin", UnavailableError("the origin is silent"))
        assert kernel.hear() == (-errno.EIO, unique, b"")
    assert errors("EIO") == before + 50
    assert len(expect_log.messages()) == 1


def test_a_muted_connection_says_nothing(kernel: Wire) -> None:
    kernel.connection.is_muted = True
    assert not kernel.connection.reply(6)
    kernel.connection.refuse(8, Op.READ, "a.bin", UnavailableError("closing"))
    assert kernel.hears() == 0


def test_an_answer_that_the_kernel_refuses_is_an_error_for_who_asked(
    expect_log: LogWatch,
) -> None:
    expect_log("the kernel refuses an answer")
    with open("/dev/full", "wb", buffering=0) as full:
        assert not Connection(full.fileno()).reply(6)


# ---- waiting


def test_who_takes_a_request_answers_it() -> None:
    waiting = Waiting()
    said: list[str] = []
    Deferred(waiting, 6, 60.0, lambda: said.append("EINTR"), lambda: said.append("EIO"))
    assert len(waiting) == 1
    assert waiting.interrupt(6)
    assert not waiting.take(6)
    assert not waiting.interrupt(6)
    waiting.expire(time.monotonic() + 100)
    assert said == ["EINTR"]


def test_requests_expire() -> None:
    waiting = Waiting()
    said: list[int] = []
    for unique, limit_s in ((2, 1.0), (4, 50.0), (6, 1.0)):
        Deferred(waiting, unique, limit_s, lambda: None, lambda u=unique: said.append(u))  # type: ignore[misc]
    assert waiting.take(6)
    waiting.expire(time.monotonic() + 10)
    assert said == [2]
    assert waiting.take(4)


def test_workers_are_few_and_survive_a_bug(expect_log: LogWatch) -> None:
    expect_log("unexpected")
    workers = Workers("test", 3)
    go, done = threading.Event(), threading.Semaphore(0)
    names: set[str] = set()

    def bug() -> None:
        raise RuntimeError("a bug")

    def work() -> None:
        names.add(threading.current_thread().name)
        go.wait(60)
        done.release()

    workers.submit(bug)
    for _ in range(20):
        workers.submit(work)
    assert until(lambda: len(names) == 3)
    go.set()
    for _ in range(20):
        assert done.acquire(timeout=60)
    assert names == {f"weightstream-test-{i}" for i in range(3)}


def test_a_folder_is_listed_once_for_all_who_wait() -> None:
    go = threading.Event()
    asked: list[str] = []
    folder: Entry = Folder("f/g")

    def children(path: str) -> Children:
        asked.append(path)
        go.wait(60)
        if path == "bad":
            raise UnavailableError("silent")
        if path == "bug":
            raise KeyError(path)
        return (folder,)

    listings = Listings(children, Workers("test", 4))
    answers: dict[str, list[object]] = {"f": [], "bad": [], "bug": []}

    def then(path: str, found: Children, error: WeightstreamError | None) -> None:
        answers[path].append(error or found)

    for path in ("f", "bad") * 5:
        listings.ask(path, lambda found, error, path=path: then(path, found, error))  # type: ignore[misc]
    assert until(lambda: len(asked) == 2)
    assert len(listings) == 2
    go.set()
    assert until(lambda: len(answers["f"]) == len(answers["bad"]) == 5)
    assert answers["f"] == [(folder,)] * 5
    assert {type(answer) for answer in answers["bad"]} == {UnavailableError}
    assert len(listings) == 0


def test_a_bug_in_a_listing_is_heard_of(expect_log: LogWatch) -> None:
    expect_log("unexpected, listing")
    heard: list[WeightstreamError | None] = []

    def children(path: str) -> Children:
        raise KeyError(path)

    Listings(children, Workers("test", 1)).ask("f", lambda _, error: heard.append(error))
    assert until(lambda: heard)
    assert heard[0] is not None
    assert heard[0].errno == errno.EIO


# ---- news


def test_news_are_told_once_and_not_about_stale_folders(kernel: Wire) -> None:
    notifier = Notifier(kernel.connection, lambda folder: folder != "stale")
    change = Change("", "a")
    notifier.tell([change, change, Change("stale", "b"), Listing(""), Listing("")])
    assert notifier.settle(60)
    assert kernel.hear() == (Notify.INVAL_ENTRY, 0, wire.inval_entry(wire.ROOT_ID, "a"))
    assert kernel.hear() == (Notify.INVAL_INODE, 0, wire.inval_inode(wire.ROOT_ID))
    assert kernel.hears() == 0
    notifier.disarm()


def test_a_disarmed_notifier_says_nothing(kernel: Wire) -> None:
    notifier = Notifier(kernel.connection, lambda _: True)
    notifier.disarm()
    notifier.tell([Change("", "a")])
    assert not notifier.settle(0.05)
    assert kernel.hears() == 0


# ---- INIT

ALL = Init((1 << 43) - 1)


def test_what_is_taken_of_a_new_kernels_offer() -> None:
    answer = handshake.answer(Offer(7, 46, 1 << 17, ALL), max_stack_depth=2)
    assert answer.minor == wire.MINOR
    assert answer.max_stack_depth == 2
    for flag in (Init.PASSTHROUGH, Init.HAS_RESEND, Init.INIT_EXT, Init.MAX_PAGES):
        assert answer.flags & flag
    for flag in (Init.WRITEBACK_CACHE, Init.AUTO_INVAL_DATA):
        assert not answer.flags & flag


def test_nothing_is_taken_that_is_not_offered() -> None:
    answer = handshake.answer(Offer(7, 31, 1 << 17, Init.ASYNC_READ), max_stack_depth=1)
    assert answer.flags == Init.ASYNC_READ
    assert (answer.minor, answer.max_stack_depth) == (31, 0)


def test_without_a_store_there_is_no_passthrough() -> None:
    answer = handshake.answer(Offer(7, 45, 1 << 17, ALL), max_stack_depth=None)
    assert not answer.flags & Init.PASSTHROUGH
    assert answer.max_stack_depth == 0


@pytest.mark.parametrize(("major", "minor"), [(6, 99), (7, 22), (7, 30)])
def test_kernels_that_are_too_old(major: int, minor: int) -> None:
    with pytest.raises(Refusal) as caught:
        handshake.answer(Offer(major, minor, 0, ALL), 1)
    assert caught.value.errno == errno.EPROTO


def test_what_was_agreed_survives_as_json() -> None:
    agreed = Negotiated(45, True, 123)
    assert Negotiated.from_json(agreed.to_json() | {"from a later version": 1}) == agreed
    assert Negotiated.from_json({}) == Negotiated(wire.MINOR, False, 0)


# ---- attributes


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        (b"security.selinux", True),
        (b"system.posix_acl_access", True),
        (b"trusted.overlay.opaque", True),
        (b"user.other", False),
        (b"user.weightstream.uri", False),
        (b"user.weightstream.no", False),
    ],
)
def test_foreign_attributes_are_told_apart(name: bytes, foreign: bool) -> None:
    body = bytes(8) + name + b"\0"
    message = wire.HEADER.pack(40 + len(body), Op.GETXATTR, 2, 1, 0, 0, 0, 0, 0) + body
    assert is_foreign(memoryview(message)) is foreign


# ---- health


def test_a_server_whose_threads_are_all_stuck_is_not_healthy(tmp_path: Path) -> None:
    """Its supervisor hears no beat then, and replaces it."""
    scene = fakes(str(tmp_path), {"a.bin": 1})
    server = KernelServer(-1, scene.tree, scene.content, Options("s3://b", "/mnt"))  # type: ignore[arg-type]
    assert server.is_healthy(60.0)
    server._busy[:] = [1] * len(server._busy)
    time.sleep(0.02)
    assert not server.is_healthy(0.01)
    server._handled[0] += 1
    assert server.is_healthy(60.0)
    time.sleep(0.02)
    assert not server.is_healthy(0.01)
    server._busy[0] = 0
    assert server.is_healthy(60.0)
