"""What a home has not begun is taken over by who has nothing left to begin."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
from tests.kit import faults as f
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import MIB, Cluster, ClusterFactory, Node

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch.source import Source, Transfer
from weightstream.p2p.exchange import Exchange, client, joining
from weightstream.p2p.exchange.crowds import pack_flags
from weightstream.p2p.exchange.server import Asked
from weightstream.p2p.members import Member

CHUNK = 256 << 10


class Slow:
    """A source whose every read takes its time; remembers what was read."""

    name = "slow"

    def __init__(self, source: Source, seconds: float) -> None:
        self._source = source
        self._seconds = seconds
        self.begun: list[int] = []

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        self.begun.append(start)
        time.sleep(self._seconds)
        self._source.read_into(blob, start, into, transfer)


def slowed(node: Node, seconds: float) -> Slow:
    """Have a node's origin take so long for each chunk."""
    slow = Slow(node.origin, seconds)
    node.source = slow
    return slow


def post(node: Node, path: str, message: Mapping[str, Any]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", node.exchange.port, timeout=10)
    connection.request("POST", path, json.dumps(message))
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def test_the_others_take_over_from_a_slow_home(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "_BATCH_S", 0.4)  # on a busy machine one would begin alone
    nodes = cluster(3)
    blob, data = nodes.put(s3, 6 * MIB)
    slow = slowed(nodes.nodes[0], 1.5)
    assert nodes.load_all(blob) == [data] * 3
    assert len(slow.begun) < 8 / 2, "of its third of 24 chunks"
    # Nodes that hear of each other too late may each read some chunks (see test_exchange).
    assert nodes.origin_bytes(blob) <= 1.5 * blob.size


def test_who_comes_late_takes_nothing(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 20.0)  # nobody stands in for who is held up
    nodes = cluster(2)
    blob, data = nodes.put(s3, 6 * MIB)
    first, late = slowed(nodes.nodes[0], 0.3), slowed(nodes.nodes[1], 0.3)
    results: list[bytes] = []
    loader = threading.Thread(target=lambda: results.append(nodes.nodes[0].load(blob)))
    loader.start()
    while not first.begun:
        time.sleep(0.01)
    results.append(nodes.nodes[1].load(blob))
    loader.join(60)
    assert results == [data] * 2
    assert not late.begun
    assert sorted(start // CHUNK for start in first.begun) == list(range(24)), "each once"


def thief(nodes: Cluster, blob: Blob, port: int) -> dict[str, Any]:
    """Have a member join that reads the origin; return what it says to take a chunk."""
    node = nodes.nodes[0]
    node.told.everybody["thief"] = Member("thief", "127.0.0.1", port, "")
    join = {
        "node": "thief", "uri": blob.uri, "size": blob.size, "version": blob.version,
        "chunk_size": CHUNK, "held": pack_flags(bytes(24)), "reads_origin": True, "start": 24,
    }  # fmt: skip
    assert post(node, "/v1/join", join)["joined"]
    return {"node": "thief", "blob": blob.id, "chunk_size": CHUNK}


def test_what_a_taker_does_not_give_is_read_all_the_same(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(2)
    blob, data = nodes.put(s3, 6 * MIB)
    slow = slowed(nodes.nodes[0], 0.2)
    slowed(nodes.nodes[1], 0.2)
    results: list[list[bytes]] = []
    loader = threading.Thread(target=lambda: results.append(nodes.load_all(blob)))
    loader.start()
    while not slow.begun:
        time.sleep(0.01)
    taking = thief(nodes, blob, 1)  # nobody listens there
    taken = [post(nodes.nodes[0], "/v1/take", taking).get("chunk") for _ in range(3)]
    loader.join(60)
    assert taken[0] is not None, "afterwards it may be known to be gone"
    assert results == [[data, data]]


@pytest.mark.slow
def test_a_home_gives_each_chunk_once_and_only_its_own(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(2)
    blob, data = nodes.put(s3, 6 * MIB)
    slow = slowed(nodes.nodes[0], 0.5)
    loader = threading.Thread(target=lambda: nodes.nodes[0].load(blob))
    loader.start()
    while not slow.begun:
        time.sleep(0.01)
    taking = thief(nodes, blob, 1)
    taken, begun = [], list(slow.begun)
    while (chunk := post(nodes.nodes[0], "/v1/take", taking).get("chunk")) is not None:
        assert chunk * CHUNK not in begun
        taken.append(chunk)
        begun = list(slow.begun)
    assert taken
    assert len(set(taken)) == len(taken)
    stranger = taking | {"node": "stranger"}
    assert post(nodes.nodes[0], "/v1/take", stranger) == {}
    assert post(nodes.nodes[0], "/v1/take", taking | {"blob": "0" * 32}) == {}
    loader.join(60)
    assert nodes.nodes[0].read(blob) == data


def test_what_a_home_reads_for_one_that_died_is_taken_over_as_well(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE_S", 20.0)  # the test says when it is dead
    nodes = cluster(1, peer_window=MIB)  # few of the other's chunks are on their way
    blob, data = nodes.put(s3, 6 * MIB)
    (node,) = nodes.nodes
    slow = slowed(node, 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node.told.everybody["dead"] = Member("dead", "127.0.0.1", silent.getsockname()[1], "")
        relay = node.exchange._relay(blob)
        relay.crowd.add("dead", True, bytes(24), 0)
        loader = threading.Thread(target=lambda: node.load(blob))
        loader.start()
        while sum(flight.asking == "dead" for flight in relay.flights()) < 4 or not slow.begun:
            time.sleep(0.01)
        taking = thief(nodes, blob, 1)
        taken = list(iter(lambda: post(node, "/v1/take", taking).get("chunk"), None))
        assert {relay.crowd.home(i) for i in taken} == {node.name}
        node.told.suspect("dead", "the test says so")
        taken = list(iter(lambda: post(node, "/v1/take", taking).get("chunk"), None))
        assert {relay.crowd.home(i) for i in taken} == {"dead"}
    loader.join(60)
    assert node.read(blob) == data


def test_who_trusts_nobody_gives_nothing_away(cluster: ClusterFactory, s3: S3Server) -> None:
    nodes = cluster(2)
    blob, _ = nodes.put(s3, 6 * MIB)
    relay = nodes.nodes[0].exchange._relay(blob)
    relay.crowd.add("other", True, bytes(24), 0)
    assert relay.give_away("other") is not None
    relay.refute()
    assert relay.give_away("other") is None, "it reads what others read as well"


def test_who_stands_in_for_a_dead_home_is_asked_as_a_home_is(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "_BATCH_S", 0.4)
    nodes = cluster(2)
    blob, data = nodes.put(s3, 6 * MIB)
    insisted: list[bool] = []
    give = Exchange.give

    def spy(self: Exchange, blob_id: str, size: int, chunk: int, asked: Asked) -> object:
        if not self._relay(blob).is_taking(chunk):  # of a taker everybody insists
            insisted.append(asked.insist)
        return give(self, blob_id, size, chunk, asked)

    monkeypatch.setattr(Exchange, "give", spy)
    for node in nodes.nodes:
        node.exchange._relay(blob).crowd.add("dead", True, bytes(24), 0)
    assert nodes.load_all(blob) == [data] * 2
    assert insisted
    assert not any(insisted), "who insists has a chunk read that was taken over"


@pytest.mark.slow
def test_who_is_banned_or_gone_takes_nothing(cluster: ClusterFactory, s3: S3Server) -> None:
    nodes = cluster(2)
    blob, data = nodes.put(s3, 6 * MIB)
    node = nodes.nodes[0]
    slow = slowed(node, 0.5)
    loader = threading.Thread(target=lambda: node.load(blob))
    loader.start()
    while not slow.begun:
        time.sleep(0.01)
    taking = thief(nodes, blob, 1)
    assert "chunk" in post(node, "/v1/take", taking)
    node.exchange._neighbours.ban("thief")
    assert post(node, "/v1/take", taking) == {}
    loader.join(60)
    assert node.read(blob) == data


class Starved:
    """A source whose first connection trickles."""

    name = "starved"

    def __init__(self, source: Source) -> None:
        self._source = source
        self.begun: list[int] = []

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        self.begun.append(start)
        step = len(into) if len(self.begun) > 1 else 64 << 10
        for done in range(0, len(into), step):
            self._source.read_into(blob, start + done, into[done : done + step], transfer)
            if step < len(into):
                time.sleep(0.5)


@pytest.mark.slow
def test_a_starved_stream_goes_on_over_a_new_connection(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(4, chunk_size=2 * MIB, deadline_s=60.0)
    blob, data = nodes.put(s3, 32 * MIB)
    nodes.proxy.add(f.When(key="w.bin", ranged=True, times=None), f.Drip(2 * MIB))
    starved = nodes.nodes[0].source = Starved(nodes.nodes[0].origin)
    assert nodes.load_all(blob) == [data] * 4
    first = starved.begun[0]
    assert any(first < start < first + 2 * MIB for start in starved.begun), "where it was"
