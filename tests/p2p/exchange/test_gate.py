"""What the gate does about an origin that is slow."""

import threading
import time

import pytest
from tests.conftest import LogWatch
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import MIB, ClusterFactory, Node
from tests.p2p.exchange.test_taking import CHUNK, Starved, slowed

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.job import Attempt
from weightstream.cachefs.fetch.source import Source, Transfer
from weightstream.errors import WeightstreamError
from weightstream.p2p.exchange import client, joining
from weightstream.p2p.exchange.flights import Flight
from weightstream.p2p.exchange.origin_reader import Split
from weightstream.p2p.exchange.relay import Relay

BLOB = Blob("s3://b/w.bin", 1000, "v1")


def relay_of(node: Node, blob: Blob) -> Relay:
    """Return what a node's exchange keeps of a blob."""
    return node.exchange._relay(blob)


def test_a_late_fault_is_read_in_parts_from_where_it_is(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(1, chunk_size=2 * MIB)
    blob, data = nodes.put(s3, 2 * MIB)
    starved = nodes.nodes[0].source = Starved(nodes.nodes[0].origin)
    assert nodes.nodes[0].read(blob, urgent=True) == data
    first, *others = starved.begun
    assert first == 0
    assert len(others) == 4
    assert 0 < min(others) < MIB, "what had come is not read again"


class StarvedTwice(Starved):
    """A source whose first connection trickles, and one of the next four."""

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        if len(self.begun) == 2:
            trickle = Starved(self._source)
            self.begun.append(start)
            trickle.read_into(blob, start, into, transfer)
        else:
            super().read_into(blob, start, into, transfer)


def test_a_late_part_of_a_fault_is_asked_for_once_more(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(1, chunk_size=2 * MIB)
    blob, data = nodes.put(s3, 2 * MIB)
    starved = nodes.nodes[0].source = StarvedTwice(nodes.nodes[0].origin)
    assert nodes.nodes[0].read(blob, urgent=True) == data
    *_, again = starved.begun
    assert len(starved.begun) == 1 + 4 + 1
    assert starved.begun[2] < again < starved.begun[2] + MIB // 2, "what had come is not read again"


class Slow(Starved):
    """One whose later connections wait before they give anything."""

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        if self.begun:
            time.sleep(0.3)
        super().read_into(blob, start, into, transfer)


def test_parts_of_a_fault_end_before_its_memory_is_given_back(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch, expect_log: LogWatch
) -> None:
    expect_log("^unexpected, at .* chunk 0")
    parts: list[threading.Thread] = []

    class Scarce(threading.Thread):
        def start(self) -> None:
            if self.name == "weightstream-fault-part":
                if parts:
                    raise RuntimeError("can't start new thread")
                parts.append(self)
            super().start()

    nodes = cluster(1, chunk_size=2 * MIB)
    blob, _ = nodes.put(s3, 2 * MIB)
    nodes.nodes[0].source = Slow(nodes.nodes[0].origin)
    monkeypatch.setattr(threading, "Thread", Scarce)
    into = memoryview(bytearray(blob.size))
    with pytest.raises(WeightstreamError, match="can't start new thread"):
        nodes.nodes[0].exchange.read_into(blob, 0, into, Attempt(lambda count: None, lambda: True))
    assert len(parts) == 1
    assert not parts[0].is_alive()


class Noting:
    """A source that notes whether who reads shares its link, by chunk."""

    name = "noting"

    def __init__(self, source: Source) -> None:
        self._source = source
        self.shared: dict[int, bool] = {}

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        self._source.read_into(blob, start, into, transfer)
        self.shared[start // CHUNK] = transfer.link_share() is not None


@pytest.mark.parametrize(("count", "shares"), [(1, False), (3, True)])
def test_a_crowd_shares_the_origins_link(
    count: int, shares: bool, cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(count)
    blob, data = nodes.put(s3, 6 * MIB)
    notings = [Noting(node.origin) for node in nodes.nodes]
    for node, noting in zip(nodes.nodes, notings, strict=True):
        node.source = noting  # of all: others may take everything over from one that starts late
    assert nodes.load_all(blob) == [data] * count
    shared = {shared for noting in notings for shared in noting.shared.values()}
    assert shares in shared
    assert count > 1 or shared == {False}


def test_a_fault_has_the_link_to_itself(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 20.0)  # nobody stands in for who is held up
    nodes = cluster(3)
    blob, data = nodes.put(s3, 6 * MIB)
    plans = [node.exchange.plan([(blob, (Extent(0, CHUNK),))]) for node in nodes.nodes]
    notings = [Noting(node.origin) for node in nodes.nodes]
    for node, noting in zip(nodes.nodes, notings, strict=True):
        node.source = noting
    chunks = range(20, 24)
    for start in (i * CHUNK for i in chunks):
        extent = Extent(start, start + CHUNK)
        assert nodes.nodes[0].read(blob, extent, urgent=True) == data[start : extent.stop]
    for plan in plans:
        plan.close()
    faults = [shares for noting in notings for i, shares in noting.shared.items() if i in chunks]
    assert len(faults) == len(chunks)
    assert not any(faults)


def test_who_reads_is_counted_by_whose_chunks_have_not_come(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "_BATCH_S", 0.4)  # on a busy machine one would begin alone
    nodes = cluster(3)
    blob, data = nodes.put(s3, 6 * MIB)
    late = [slowed(nodes.nodes[0], 0.5), slowed(nodes.nodes[2], 0.3)]
    counts: list[int] = []

    def watch() -> None:
        relay = relay_of(nodes.nodes[1], blob)
        while not relay.flights():
            time.sleep(0.01)
        while relay.readers() or not counts:
            counts.append(len(relay.readers()))
            time.sleep(0.02)
        counts.append(len(relay.readers()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert nodes.load_all(blob) == [data] * 3
    watcher.join(10)
    assert all(one.begun for one in late)
    assert max(counts) == 2, "the others: who looks is none of those that answer it"
    assert counts[-1] == 0


def test_parts_advance_a_flight_by_what_has_no_gap() -> None:
    flight = Flight(BLOB, 0, Extent(0, 1000))
    flight.advance(200)
    parts = Split(flight, 4)
    assert [parts.left(i) for i in range(4)] == [(200, 400), (400, 600), (600, 800), (800, 1000)]
    parts.advance(1, 200)
    assert flight.position == 200
    parts.advance(0, 100)
    assert flight.position == 300
    parts.advance(0, 100)
    assert flight.position == 600
    parts.advance(3, 200)
    parts.advance(2, 200)
    assert flight.position == 1000
