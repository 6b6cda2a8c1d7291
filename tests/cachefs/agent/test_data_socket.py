"""The data socket against clients that break its rules, stop reading, or die."""

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.kit.models import random_bytes

from weightstream.cachefs.agent import wire
from weightstream.cachefs.agent.arena import Arena
from weightstream.cachefs.agent.client import AgentSource
from weightstream.cachefs.agent.links import Link, Links
from weightstream.cachefs.agent.node import NoPlan
from weightstream.cachefs.agent.server import DataServer
from weightstream.cachefs.agent.serving import Teller
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.budget import MemoryBudget
from weightstream.cachefs.fetch.source import Plan, Source, Transfer
from weightstream.cachefs.origin import Checksum
from weightstream.cachefs.store.write_back import copy
from weightstream.errors import (
    AccessDeniedError,
    LoadCancelled,
    OriginError,
    UnavailableError,
    UsageError,
)
from weightstream.settings import Settings, load_settings

MIB = 1 << 20
DATA = random_bytes(3 * MIB, "data-socket")
BLOB = Blob("s3://models/m/file", len(DATA), "v1")
ROOT = "s3://models/m"


class Memory:
    """A source whose bytes are in memory; it can be told to fail or to hang after some bytes."""

    def __init__(self, name: str = "origin") -> None:
        self.name = name
        self.reads = 0
        self.fails_after: int | None = None
        self.hangs_after: int | None = None
        self.failure: OriginError = AccessDeniedError("no such key for you")
        self.pause_s = 0.0
        self.cancelled = threading.Event()

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        self.reads += 1
        time.sleep(self.pause_s)
        for begin in range(0, len(into), MIB // 2):
            if self.fails_after is not None and begin >= self.fails_after:
                raise self.failure
            if self.hangs_after is not None and begin >= self.hangs_after:
                transfer.on_cancel(self.cancelled.set)
                assert self.cancelled.wait(20)
                raise LoadCancelled("cancelled")
            count = min(MIB // 2, len(into) - begin)
            into[begin : begin + count] = DATA[start + begin : start + begin + count]
            transfer.advance(count)

    def checksum(self, blob: Blob) -> Checksum | None:
        return Checksum("crc32c", 7)


class Reads:
    """What connections ask, in place of an agent."""

    def __init__(self) -> None:
        self.source = Memory("peers")
        self.plans: list[object] = []
        self.ended = threading.Event()

    def source_of(self, root: str, blob: Blob) -> Source:
        if not blob.uri.startswith(f"{root}/"):
            raise UsageError(f"{blob.uri} does not lie under {root}")
        return self.source

    def plan(self, root: str, wanted: object) -> Plan:
        self.plans.append(wanted)
        return self

    def hurry(self, blob: Blob, extent: Extent) -> None:
        """See `Plan`."""

    def close(self) -> None:
        self.ended.set()


class Counting:
    """A transfer that counts."""

    urgent = False
    step_bytes = MIB
    is_fresh = False

    def __init__(self) -> None:
        self.done = 0
        self.cancel: Callable[[], None] | None = None
        self.on_advance: Callable[[], None] = lambda: None

    def link_share(self) -> None:
        return

    def advance(self, count: int) -> None:
        self.done += count
        self.on_advance()

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        self.cancel = callback


@pytest.fixture
def reads() -> Reads:
    return Reads()


@pytest.fixture
def budget() -> MemoryBudget:
    return MemoryBudget(16 * MIB)


@pytest.fixture
def arena(budget: MemoryBudget) -> Iterator[Arena]:
    made = Arena(budget, 2 * MIB)
    yield made
    made.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"run_directory": tmp_path, "store": tmp_path / "store"})


@pytest.fixture
def server(tmp_path: Path, arena: Arena, reads: Reads) -> Iterator[DataServer]:
    made = DataServer(tmp_path, arena, reads)
    yield made
    made.close()


@pytest.fixture
def source(server: DataServer, settings: Settings) -> Iterator[AgentSource]:
    made = AgentSource(Memory(), ROOT, settings)
    yield made
    made.close()


def read(source: AgentSource, start: int = 0, stop: int = len(DATA)) -> Counting:
    """Read a range, check its bytes, return how it went."""
    into, counting = bytearray(stop - start), Counting()
    source.read_into(BLOB, start, memoryview(into), counting)
    assert into == DATA[start:stop]
    assert counting.done == stop - start
    return counting


def eventually(happened: Callable[[], bool], timeout_s: float = 10.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until_s, "did not happen"
        time.sleep(0.005)


def fallback_of(source: AgentSource) -> Memory:
    fallback = source._fallback
    assert isinstance(fallback, Memory)
    return fallback


# Bytes


@pytest.mark.parametrize(
    "extent", [(0, len(DATA)), (0, 1), (5, MIB + 7), (len(DATA) - 3, len(DATA))]
)
def test_ranges_come_through_shared_memory(source: AgentSource, extent: tuple[int, int]) -> None:
    read(source, *extent)
    assert source.name == "agent"
    assert fallback_of(source).reads == 0


def test_without_shared_memory_bytes_come_over_the_socket(
    tmp_path: Path, reads: Reads, settings: Settings
) -> None:
    server = DataServer(tmp_path, None, reads)
    source = AgentSource(Memory(), ROOT, settings)
    try:
        read(source)
        read(source, 5, 2 * MIB + 9)
        assert fallback_of(source).reads == 0
    finally:
        source.close()
        server.close()


def test_the_checksum_is_the_origins(source: AgentSource) -> None:
    assert source.checksum(BLOB) == Checksum("crc32c", 7)


def test_slots_are_used_again_and_given_back(
    source: AgentSource, arena: Arena, budget: MemoryBudget
) -> None:
    for _ in range(5):
        read(source)
    assert budget.used_bytes == arena.slot_bytes
    eventually(lambda: len(arena._idle) == 1)
    arena.trim()
    assert budget.used_bytes == 0
    read(source)


def test_a_warm_arena_has_its_pages_before_the_first_load(
    arena: Arena, budget: MemoryBudget
) -> None:
    arena.warm(64 * MIB)
    held = budget.limit_bytes // 8
    assert budget.used_bytes == held
    assert os.stat(arena.descriptor).st_blocks * 512 == held
    arena.trim(0.0, 64 * MIB)
    assert budget.used_bytes == held
    slot = arena.take(0.0)
    assert slot is not None
    assert budget.used_bytes == held
    slot.release()


def test_the_clients_mapping_can_neither_write_nor_cut_the_arena(arena: Arena) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(os.open(f"/proc/self/fd/{arena.descriptor}", os.O_RDWR), 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(arena.descriptor, b"x")


# What goes wrong at the agent


def test_what_the_agent_cannot_read_comes_from_the_origin(
    source: AgentSource, reads: Reads
) -> None:
    reads.source.fails_after = MIB
    read(source)
    assert reads.source.reads == 1
    assert fallback_of(source).reads == 1
    assert source.name == "origin"
    read(source)  # it is left alone for a while
    assert reads.source.reads == 1


def test_what_breaks_at_the_agent_breaks_one_range(source: AgentSource, reads: Reads) -> None:
    reads.source.fails_after, reads.source.failure = MIB, UnavailableError("reset")
    read(source)
    assert (reads.source.reads, fallback_of(source).reads) == (1, 1)
    reads.source.fails_after = None
    read(source)
    assert fallback_of(source).reads == 1


def test_what_does_not_lie_under_the_root_is_refused(
    server: DataServer, settings: Settings, reads: Reads
) -> None:
    source = AgentSource(Memory(), "s3://models/other", settings)
    read(source)
    assert reads.source.reads == 0
    source.close()


def test_an_agent_that_ends_in_mid_range_costs_nothing_but_that(
    source: AgentSource, server: DataServer, reads: Reads
) -> None:
    reads.source.hangs_after = MIB
    counting = Counting()
    counting.on_advance = lambda: server.close() if counting.done == MIB else None
    into = bytearray(len(DATA))
    source.read_into(BLOB, 0, memoryview(into), counting)
    assert into == DATA
    assert counting.done == len(DATA)
    assert reads.source.cancelled.is_set()


@pytest.mark.slow
def test_an_agent_that_waits_for_its_origin_is_waited_for(
    source: AgentSource, reads: Reads
) -> None:
    reads.source.pause_s = 1.5 * wire.SILENCE_S
    read(source)
    assert fallback_of(source).reads == 0


def test_a_cancelled_range_stops_the_agents_read(source: AgentSource, reads: Reads) -> None:
    reads.source.hangs_after = MIB
    counting = Counting()
    timer = threading.Timer(0.2, lambda: counting.cancel and counting.cancel())
    timer.start()
    with pytest.raises(LoadCancelled):
        source.read_into(BLOB, 0, memoryview(bytearray(len(DATA))), counting)
    assert reads.source.cancelled.wait(5)
    assert fallback_of(source).reads == 0
    timer.join()


def frames(sock: socket.socket) -> list[tuple[int, int]]:
    return list(wire.FRAME.iter_unpack(sock.recv(4096)))


def test_what_was_not_told_is_told_with_the_next_word() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        teller = Teller(ours, threading.Lock(), urgent=False)
        teller.advance(5)
        assert frames(theirs) == [(wire.BYTES, 5)]
        teller.advance(6)
        teller.beat()
        assert frames(theirs) == [(wire.BYTES, 6)]
        teller.beat()
        assert frames(theirs) == [(wire.BEAT, 0)]
        teller.advance(7)
        teller.end(wire.END)
        assert frames(theirs) == [(wire.BYTES, 7), (wire.END, 0)]
        teller.beat()  # late: the next answer must not begin with it
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)


def until_it_would_wait(work: Callable[[], object]) -> None:
    with suppress(BlockingIOError):
        while True:
            work()


def test_nothing_is_lost_when_nobody_reads() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        teller = Teller(ours, threading.Lock(), urgent=False)
        teller.advance(5)
        ours.setblocking(False)
        until_it_would_wait(lambda: ours.send(wire.FRAME.pack(wire.BEAT, 0)))
        ours.setblocking(True)
        teller.advance(6)
        teller.beat()
        theirs.setblocking(False)
        until_it_would_wait(lambda: theirs.recv(1 << 20))
        theirs.setblocking(True)
        teller.end(wire.END)
        assert frames(theirs) == [(wire.BYTES, 6), (wire.END, 0)]


# What goes wrong at clients


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path / "agent.sock"))
    return sock


def greeted(path: Path, shares: bool = True) -> socket.socket:
    sock = connect(path)
    wire.send_head(sock, {"op": "hello", "version": wire.VERSION, "shares": shares})
    _, descriptor = wire.receive_greeting(sock)
    if descriptor >= 0:
        os.close(descriptor)
    return sock


def request(start: int = 0, stop: int = MIB) -> dict[str, object]:
    return {"op": "read", "root": ROOT, "range": [start, stop], **wire.blob_to_json(BLOB)}


def is_closed(sock: socket.socket) -> bool:
    """Wait for the end, whatever was said before it."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return True


def head(value: object) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<I", len(text)) + text


GARBAGE = [
    b"\xff" * 64,
    b"GET / HTTP/1.1\r\n\r\n",
    struct.pack("<I", 0),
    struct.pack("<I", 1 << 31),
    struct.pack("<I", 70_000) + b"{" * 70_000,
    struct.pack("<I", 4) + b"\xff\xfe\xfd\xfc",
    struct.pack("<I", 60_000) + b"[" * 60_000,
    head([]),
    head({"op": "read"}),
    head({"op": "hello", "version": 99}),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_its_own_connection_alone(
    source: AgentSource, tmp_path: Path, garbage: bytes
) -> None:
    with connect(tmp_path) as sock:
        sock.sendall(garbage)
        sock.shutdown(socket.SHUT_WR)
        assert is_closed(sock)
    read(source)
    assert fallback_of(source).reads == 0


BAD_REQUESTS: list[dict[str, object]] = [
    {"op": "delete"},
    {},
    {**request(), "range": [0, len(DATA) + 1]},
    {**request(), "range": [5, 5]},
    {**request(), "range": [-1, 5]},
    {**request(), "range": [0.5, 5]},
    {**request(), "range": None},
    {**request(0, len(DATA))},  # longer than a slot
    {**request(), "size": True},
    {**request(), "size": 1 << 80},
    {**request(), "uri": ["s3://models/m/file"]},
    {**request(), "uri": "s3://models/m/\0"},
    {**request(), "root": 7},
    {"op": "plan", "root": ROOT, "wanted": "everything"},
    {"op": "plan", "root": ROOT, "wanted": [7]},
    {"op": "plan", "root": ROOT, "wanted": [{**wire.blob_to_json(BLOB), "extents": [[9, 1]]}]},
]


@pytest.mark.parametrize("bad", BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
def test_a_bad_request_ends_its_own_connection_alone(
    source: AgentSource, tmp_path: Path, reads: Reads, bad: dict[str, object]
) -> None:
    with greeted(tmp_path) as sock:
        wire.send_head(sock, bad)
        assert is_closed(sock)
    assert reads.source.reads == 0
    assert reads.plans == []
    read(source)
    assert fallback_of(source).reads == 0


def test_a_client_that_dies_frees_its_slot(
    source: AgentSource, tmp_path: Path, reads: Reads, arena: Arena, budget: MemoryBudget
) -> None:
    reads.source.hangs_after = 0
    with greeted(tmp_path) as sock:
        wire.send_head(sock, request())
        eventually(lambda: reads.source.reads == 1)
        assert budget.used_bytes == arena.slot_bytes
    assert reads.source.cancelled.wait(5)
    eventually(lambda: len(arena._idle) == 1)


def test_clients_that_keep_their_slots_leave_the_others_to_the_origin(
    source: AgentSource, tmp_path: Path, arena: Arena
) -> None:
    kept = [greeted(tmp_path) for _ in range(4)]  # half of the budget is the arena's
    try:
        for sock in kept:
            wire.send_head(sock, request())
            assert "offset" in wire.receive_head(sock)
        assert arena.take(0.0) is None
        read(source, 0, MIB)
        assert fallback_of(source).reads == 1
        kept.pop().close()
        eventually(lambda: bool(arena._idle))
        read(source, 0, MIB)  # it was busy, not broken
        assert fallback_of(source).reads == 1
    finally:
        for sock in kept:
            sock.close()


def test_a_client_that_is_too_slow_never_takes_anothers_bytes_for_its_own(
    source: AgentSource, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sleeps with the bytes before it; the agent takes the slot back, others use it."""
    monkeypatch.setattr("weightstream.cachefs.agent.serving._MESSAGE_S", 0.2)

    def copy_late(place: memoryview, into: memoryview) -> None:
        eventually(lambda: bool(arena._idle))
        for _, slot in arena._idle:
            slot.view[:] = bytes(len(slot.view))
        copy(place, into)

    monkeypatch.setattr("weightstream.cachefs.agent.links.copy", copy_late)
    read(source)
    assert fallback_of(source).reads == 1


def test_a_client_that_reads_nothing_is_dropped(
    source: AgentSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: DataServer
) -> None:
    monkeypatch.setattr("weightstream.cachefs.agent.serving._MESSAGE_S", 0.3)
    with greeted(tmp_path, shares=False) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.send_head(sock, request())
        read(source)
        eventually(lambda: server.connections == 1)
        assert is_closed(sock)


def test_no_more_clients_than_threads_are_bearable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: DataServer, settings: Settings
) -> None:
    monkeypatch.setattr("weightstream.cachefs.agent.server._MOST_CONNECTIONS", 2)
    with greeted(tmp_path), greeted(tmp_path):
        source = AgentSource(Memory(), ROOT, settings)
        read(source)
        assert fallback_of(source).reads == 1
        source.close()


# Plans


def test_a_plan_is_held_as_long_as_the_client_wants(source: AgentSource, reads: Reads) -> None:
    extents = (Extent(0, MIB), Extent(2 * MIB, len(DATA)))
    plan = source.plan([(BLOB, extents)])
    assert reads.plans == [[(BLOB, extents)]]
    assert not reads.ended.wait(0.1)
    plan.close()
    assert reads.ended.wait(5)


def test_a_plan_for_no_agent_is_none_and_harmless(settings: Settings) -> None:
    source = AgentSource(Memory(), ROOT, settings)
    plan = source.plan([(BLOB, (Extent(0, 5),))])
    assert plan._link is None, "nobody was told"
    plan.close()
    read(source)
    NoPlan().close()


# Forks


def test_a_forked_child_reads_over_connections_of_its_own(
    source: AgentSource, tmp_path: Path
) -> None:
    read(source)
    links: list[Link] = source._links._idle
    assert len(links) == 1
    child = os.fork()
    if not child:  # no test may go on in it
        try:
            assert source._links._idle == []
            read(source)
            os._exit(0 if fallback_of(source).reads == 0 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert source._links._idle == links
    assert links[0].is_alive()
    read(source)


def test_links_that_the_agent_closed_are_not_used(
    source: AgentSource, server: DataServer, tmp_path: Path, arena: Arena, reads: Reads
) -> None:
    read(source)
    server.close()
    again = DataServer(tmp_path, arena, reads)
    try:
        read(source)
        assert fallback_of(source).reads == 0
    finally:
        again.close()
    assert isinstance(source._links, Links)
