"""Faults go before bulk: at the origin's link, at the sender and at the receiver."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pytest
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import MIB, ClusterFactory, Node

from weightstream.cachefs.blob import Blob, Extent
from weightstream.p2p.exchange import Exchange, lanes
from weightstream.p2p.exchange.client import ChunkName
from weightstream.p2p.exchange.lanes import Hold, Lanes
from weightstream.p2p.exchange.wire import Channel


class Clock:
    """Stands in for the module `time`; sleeping is remembered."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.slept_s += seconds


# At the origin's link


Told = list[tuple[str, Mapping[str, Any]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Record who is told to hold, and whether it does."""
    found: Told = []
    heard = Exchange.hold

    def spy(self: Exchange, message: Mapping[str, Any]) -> None:
        found.append((self._identity.node, message))
        heard(self, message)

    monkeypatch.setattr(Exchange, "hold", spy)
    return found


def homes_of(node: Node, blob: Blob) -> tuple[str, ...]:
    return node.exchange._relay(blob).crowd.nodes


def test_the_other_homes_hold_their_bulk_while_one_reads_a_fault(
    cluster: ClusterFactory, s3: S3Server, told: Told
) -> None:
    nodes = cluster(4, chunk_size=MIB)
    blob, data = nodes.put(s3, 16 * MIB)
    plans = [node.exchange.plan([(blob, (Extent(0, MIB),))]) for node in nodes.nodes]
    asker = nodes.nodes[0]
    until_s = time.monotonic() + 10
    while len(homes_of(asker, blob)) < 4 and time.monotonic() < until_s:
        time.sleep(0.01)
    relay = asker.exchange._relay(blob)
    chunk = next(i for i in range(1, 16) if relay.crowd.home(i) != asker.name)
    start = chunk * MIB
    assert asker.read(blob, Extent(start, start + MIB), urgent=True) == data[start : start + MIB]
    others = {node.name for node in nodes.nodes} - {relay.crowd.home(chunk)}
    while {name for name, _ in told} != others and time.monotonic() < until_s:
        time.sleep(0.01)
    assert {name for name, _ in told} == others
    for plan in plans:
        plan.close()


def test_bulk_holds_up_nobody(cluster: ClusterFactory, s3: S3Server, told: Told) -> None:
    nodes = cluster(3)
    blob, data = nodes.put(s3, 4 * MIB)
    assert nodes.load_all(blob) == [data] * 3
    assert told == []


def test_strangers_hold_nobody_up(cluster: ClusterFactory, s3: S3Server) -> None:
    nodes = cluster(2)
    blob, _ = nodes.put(s3, MIB)
    node, other = nodes.nodes
    relay = node.exchange._relay(blob)
    held = node.exchange._gate._reader.hold
    message = {"node": other.name, "blob": blob.id, "chunk_size": relay.chunk_size}
    for wrong in ({"node": "stranger"}, {"blob": "0" * 32}, {"chunk_size": 7}):
        node.exchange.hold(message | wrong)
    node.exchange.hold(message)  # a member, but no home of it
    assert held._until_s < time.monotonic()
    relay.crowd.add(other.name, True, b"", 0)
    node.exchange.hold(message)
    assert held._until_s > time.monotonic() - 1.0


@pytest.mark.parametrize("wrong", [{"node": 1}, {"blob": None}, {"chunk_size": "x"}])
def test_a_hold_without_sense_is_hung_up_on(
    cluster: ClusterFactory, s3: S3Server, wrong: dict[str, object]
) -> None:
    (node,) = cluster(1).nodes
    message = {"node": "a", "blob": "b", "chunk_size": 1} | wrong
    connection = http.client.HTTPConnection("127.0.0.1", node.exchange.port, timeout=10)
    connection.request("POST", "/v1/hold", json.dumps(message))
    with pytest.raises((http.client.BadStatusLine, ConnectionError)):
        connection.getresponse()
    connection.close()


def test_whatever_faults_there_are_bulk_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(lanes, "time", clock)
    held = Hold()
    began_s = clock.now_s
    while clock.now_s < began_s + 10.0:
        held.begin()
        held.wait()
        clock.now_s += 0.001  # a piece of bulk
    assert 5.0 < clock.slept_s < 6.2


# At the sender and at the receiver


def test_bulk_waits_while_a_fault_moves_and_not_for_one_that_does_not() -> None:
    made = Lanes()

    def waited_s() -> float:
        began_s = time.monotonic()
        made.give_way()
        return time.monotonic() - began_s

    assert waited_s() < 0.05
    with made.fault():
        assert lanes._PAUSE_S * 0.9 < waited_s() < 1.0
        assert waited_s() < 0.05, "it has waited for this one"
        made.moves()
        assert lanes._STEP_S * 0.9 < waited_s() < 1.0
    assert waited_s() < 0.05
    assert made.sees_faults


def test_bulk_goes_on_as_soon_as_a_fault_is_over() -> None:
    made = Lanes()
    over = threading.Event()

    def fault() -> None:
        with made.fault():
            while not over.wait(0.01):
                made.moves()

    faulting = threading.Thread(target=fault)
    faulting.start()
    while not made.sees_faults:
        time.sleep(0.001)
    threading.Timer(0.4, over.set).start()
    began_s = time.monotonic()
    made.give_way()
    assert 0.3 < time.monotonic() - began_s < 5.0
    faulting.join()


class Hurried:
    """A sink to which a reader comes with the first bytes; remembers whether bulk was held up."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self.is_hurried = False
        self.held: list[bool] = []

    def began(self, interrupt: Callable[[], None]) -> None:
        return

    def ended(self) -> None:
        return

    def advance(self, count: int) -> None:
        self.held.append(self._lanes._faults > 0)
        self.is_hurried = True

    def waiting(self, chain: tuple[str, ...], progress: int) -> None:
        return


def test_bulk_gives_way_to_bulk_that_a_reader_has_come_to(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(2, chunk_size=4 * MIB)
    blob, data = nodes.put(s3, 4 * MIB)
    holder, asker = nodes.nodes
    assert holder.load(blob) == data
    client = asker.exchange._client
    sink, into = Hurried(client._lanes), bytearray(blob.size)
    member = asker.told.everybody[holder.name]
    name = ChunkName(blob, 4 * MIB, 0)
    client.fetch(member, name, memoryview(into), sink, fault=False, insist=False)
    assert into == data
    assert len(sink.held) > 1
    assert not sink.held[0]
    assert all(sink.held[1:])
    assert not client._lanes._faults, "it is over"


def test_what_was_sent_is_waited_for_until_it_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            channel = Channel(here)
            channel.drain(5.0)
            here.setblocking(False)
            with suppress(BlockingIOError):
                while True:  # until the other side's window is full
                    here.send(bytes(1 << 20))
            began_s = time.monotonic()
            channel.drain(0.2)
            assert 0.2 <= time.monotonic() - began_s < 2.0
            reader = threading.Thread(target=lambda: _read_all(there))
            reader.start()
            channel.drain(10.0)
            assert time.monotonic() - began_s < 9.0
            here.shutdown(socket.SHUT_WR)
            reader.join()


def _read_all(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass
