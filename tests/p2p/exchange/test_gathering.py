"""A chunk whose home is slow to pass it on is shared by those who wait for it, block by block."""

import http.client
import json
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import MIB, Cluster, ClusterFactory, Node

from weightstream import metrics
from weightstream.cachefs.blob import Blob, Extent
from weightstream.errors import LoadCancelled
from weightstream.p2p.exchange import Exchange, bringing, flights
from weightstream.p2p.exchange.flights import Flight, Scatter
from weightstream.p2p.exchange.passing import Passing
from weightstream.p2p.exchange.server import Server
from weightstream.p2p.exchange.vouching import Vouched
from weightstream.p2p.exchange.wire import Channel
from weightstream.p2p.members import Member
from weightstream.p2p.schedule import BLOCK_BYTES, acting_home

CHUNK = 4 * MIB
SIZE = 16 * MIB


def crowd(cluster: ClusterFactory, **overrides: object) -> Cluster:
    return cluster(5, chunk_size=CHUNK, **overrides)


def server_of(node: Node) -> Server:
    return node.exchange._server


def slow_uplinks(nodes: Cluster) -> None:
    """Let each node send 256 KiB in 40 ms, all its connections together: a home is far behind when
    it has a chunk."""
    for node in nodes.nodes:
        server_of(node)._lanes.give_way = Uplink().wait  # type: ignore[method-assign]


class Uplink:
    """Lets one piece after the other through, in the order in which they come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_s = 0.0

    def wait(self) -> None:
        with self._lock:
            self._free_s = max(time.monotonic(), self._free_s) + 0.04
            free_s = self._free_s
        time.sleep(max(0.0, free_s - time.monotonic()))


Parts = list[tuple[str, bool]]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    """Record who is asked for a part, and whether it reads that chunk from the origin itself."""
    asked: Parts = []
    give_part = Exchange.give_part

    def spy(self: Exchange, blob_id: str, chunk_size: int, chunk: int) -> object:
        found = give_part(self, blob_id, chunk_size, chunk)
        asked.append((self._identity.node, isinstance(found, Flight) and found.from_origin))
        return found

    monkeypatch.setattr(Exchange, "give_part", spy)
    return asked


def wrong_of(cause: str) -> float:
    return metrics.samples().get(f'weightstream_peer_failures_total{{cause="{cause}"}}', 0.0)


def ask(node: Node, path: str, part: str) -> tuple[int, bytes]:
    """Ask for a part of a chunk as any HTTP client would."""
    connection = http.client.HTTPConnection("127.0.0.1", node.exchange.port, timeout=10)
    try:
        connection.request("GET", path, headers={"Range": part, "Priority": "bulk"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("encrypted", [False, True])
def test_receivers_give_each_other_what_the_home_is_slow_to_send(
    cluster: ClusterFactory, s3: S3Server, parts: Parts, tmp_path: Path, encrypted: bool
) -> None:
    overrides: dict[str, object] = {}
    if encrypted:
        secret = tmp_path / "secret"
        secret.write_text("0" * 64)
        secret.chmod(0o600)
        overrides = {"peer_encryption": "on", "cluster_secret_file": str(secret)}
    nodes = crowd(cluster, **overrides)
    blob, data = nodes.put(s3, SIZE)
    slow_uplinks(nodes)
    assert nodes.load_all(blob) == [data] * 5
    assert nodes.origin_bytes(blob) <= 1.3 * blob.size
    assert any(not from_origin for _, from_origin in parts), "nobody asked another receiver"


def test_a_receiver_that_passes_on_wrong_bytes_costs_one_more_trip(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = crowd(cluster)
    blob, data = nodes.put(s3, SIZE)
    slow_uplinks(nodes)
    lied: list[int] = []
    send_part = server_of(nodes.nodes[2])._send_part

    def send_wrong(channel: Channel, flight: Flight, start: int, stop: int) -> None:
        if flight.from_origin:
            send_part(channel, flight, start, stop)
            return
        lied.append(start)
        flight.wait_part(start, stop, 10.0)
        head = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {stop - start}\r\n\r\n"
        channel.sock.sendall(head.encode() + bytes(stop - start))

    monkeypatch.setattr(server_of(nodes.nodes[2]), "_send_part", send_wrong)
    before = wrong_of("mixed")
    assert nodes.load_all(blob) == [data] * 5
    assert lied
    assert wrong_of("mixed") > before
    for node in nodes.nodes:
        assert not node.exchange._neighbours._banned, "it may have come wrong to its sender"
        assert not node.told.suspected


@pytest.mark.parametrize("what", ["404", "hang up", "nothing but 102", "trickle", "too much"])
def test_what_a_receiver_does_not_give_its_home_does(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    nodes = crowd(cluster)
    blob, data = nodes.put(s3, SIZE)
    slow_uplinks(nodes)
    refused: list[int] = []
    send_part = Server._send_part

    def refuse(server: Server, channel: Channel, flight: Flight, start: int, stop: int) -> None:
        if flight.from_origin:
            send_part(server, channel, flight, start, stop)
            return
        refused.append(start)
        length = b"Content-Length: %d\r\n\r\n" % (stop - start)
        if what == "404":
            channel.sock.sendall(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")
        elif what == "hang up":
            raise ConnectionResetError
        elif what == "too much":  # as who knows nothing of ranges
            channel.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4194336\r\n\r\n")
        elif what == "trickle":
            channel.sock.sendall(b"HTTP/1.1 206 Partial Content\r\n" + length)
            while True:  # until the other side has had enough
                channel.sock.sendall(b"x")
                time.sleep(0.1)
        else:
            while True:
                channel.sock.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")
                time.sleep(0.1)

    monkeypatch.setattr(Server, "_send_part", refuse)
    assert nodes.load_all(blob) == [data] * 5
    assert refused
    assert nodes.origin_bytes(blob) <= 1.3 * blob.size


def test_a_home_that_ends_meanwhile_is_stood_in_for(
    cluster: ClusterFactory, s3: S3Server, parts: Parts
) -> None:
    nodes = crowd(cluster)
    blob, data = nodes.put(s3, SIZE)
    slow_uplinks(nodes)
    results: dict[str, bytes] = {}

    def load(node: Node) -> None:
        with suppress(LoadCancelled):  # it is closed in the midst of it
            results[node.name] = node.load(blob)

    loaders = [threading.Thread(target=load, args=(node,)) for node in nodes.nodes]
    for loader in loaders:
        loader.start()
    dying: Node | None = None
    while any(loader.is_alive() for loader in loaders):
        homes = {name for name, from_origin in parts if from_origin}
        if dying := next((node for node in nodes.nodes if node.name in homes), None):
            dying.exchange.close()
            break
        time.sleep(0.005)
    assert dying is not None, "nobody asked a home for a part"
    for loader in loaders:
        loader.join(60)
    living = [node.name for node in nodes.nodes if node is not dying]
    assert [results.get(name) for name in living] == [data] * 4


# What is sent on request


def test_a_part_of_what_is_stored_is_sent(cluster: ClusterFactory, s3: S3Server) -> None:
    nodes = cluster(1, chunk_size=MIB)
    blob, data = nodes.put(s3, 2 * MIB + 77)
    (node,) = nodes.nodes
    assert node.load(blob) == data
    path = f"/v1/chunk/{blob.id}/{MIB}/"
    assert ask(node, path + "1", "bytes=5-1004") == (206, data[MIB + 5 : MIB + 1005])
    assert ask(node, path + "2", "bytes=0-76") == (206, data[2 * MIB :])


def test_a_part_of_what_is_not_here_is_not_brought(cluster: ClusterFactory, s3: S3Server) -> None:
    nodes = cluster(2, chunk_size=MIB)
    blob, data = nodes.put(s3, 4 * MIB)
    node = nodes.nodes[0]
    assert node.read(blob, Extent(0, MIB)) == data[:MIB]
    sent = nodes.origin_bytes(blob)
    absent = next(i for i in range(1, 4) if node.exchange._relay(blob).flight(i) is None)
    assert ask(node, f"/v1/chunk/{blob.id}/{MIB}/{absent}", "bytes=0-99")[0] == 404
    assert ask(node, f"/v1/chunk/{'0' * 32}/{MIB}/0", "bytes=0-99")[0] == 404
    assert nodes.origin_bytes(blob) == sent


@pytest.mark.parametrize(
    "part",
    ["bytes=", "bytes=5-4", "bytes=0-1048576", "bytes=-5", "bytes=0-", "bytes=a-b", "bytes=0-1,3-4",
     "bytes=\u00b2-\u00b3", "0-9", "bytes=" + "1" * 30 + "-" + "2" * 30],
)  # fmt: skip
def test_a_range_that_is_none_is_hung_up_on(
    cluster: ClusterFactory, s3: S3Server, part: str
) -> None:
    nodes = cluster(1, chunk_size=MIB)
    blob, data = nodes.put(s3, MIB)
    (node,) = nodes.nodes
    assert node.load(blob) == data
    with pytest.raises((http.client.BadStatusLine, ConnectionError)):
        ask(node, f"/v1/chunk/{blob.id}/{MIB}/0", part)
    assert ask(node, f"/v1/chunk/{blob.id}/{MIB}/0", "bytes=0-9") == (206, data[:10])


def test_a_range_beyond_the_last_chunk_is_hung_up_on(cluster: ClusterFactory, s3: S3Server) -> None:
    nodes = cluster(1, chunk_size=MIB)
    blob, data = nodes.put(s3, 1000)
    (node,) = nodes.nodes
    assert node.load(blob) == data
    with pytest.raises((http.client.BadStatusLine, ConnectionError)):
        ask(node, f"/v1/chunk/{blob.id}/{MIB}/0", "bytes=0-1000")


@pytest.mark.parametrize(
    "wrong",
    [{"node": 1}, {"blob": None}, {"chunk_size": "x"}, {"chunk": None}, {"receivers": []},
     {"receivers": "ab"}, {"receivers": [1]}, {"receivers": ["n"] * 65}],
)  # fmt: skip
def test_a_scatter_without_sense_is_hung_up_on(
    cluster: ClusterFactory, s3: S3Server, wrong: dict[str, object]
) -> None:
    nodes = cluster(1)
    (node,) = nodes.nodes
    message = {"node": "a", "blob": "b", "chunk_size": 1, "chunk": 0, "receivers": ["a"]} | wrong
    connection = http.client.HTTPConnection("127.0.0.1", node.exchange.port, timeout=10)
    connection.request("POST", "/v1/scatter", json.dumps(message))
    with pytest.raises((http.client.BadStatusLine, ConnectionError)):
        connection.getresponse()
    connection.close()


@pytest.mark.parametrize(
    ("receivers", "is_heard"),
    [
        (["me", "other"], True),
        (["other"], False),
        (["me", "me"], False),
        (["me", "stranger"], False),
    ],
)
def test_only_members_share_and_only_if_one_is_told_so(
    cluster: ClusterFactory, s3: S3Server, receivers: list[str], is_heard: bool
) -> None:
    nodes = cluster(2)
    blob, _ = nodes.put(s3, MIB)
    node, other = nodes.nodes
    names = {"me": node.name, "other": other.name, "stranger": "stranger"}
    relay = node.exchange._relay(blob)
    flight, _ = relay.board(0)
    flight.begin(Memory(len(flight.extent)))  # type: ignore[arg-type]
    flight.asking = other.name
    message = {
        "node": other.name,
        "blob": blob.id,
        "chunk_size": relay.chunk_size,
        "chunk": 0,
        "receivers": [names[receiver] for receiver in receivers],
    }
    assert node.exchange.scattered(message) == {}
    assert (flight.scatter is not None) == is_heard


def test_a_reader_that_comes_meanwhile_gets_its_bytes(
    cluster: ClusterFactory, s3: S3Server, parts: Parts
) -> None:
    nodes = crowd(cluster)
    blob, data = nodes.put(s3, SIZE)
    slow_uplinks(nodes)
    read: list[bytes] = []
    over = threading.Event()

    def fault() -> None:
        while not over.wait(0.005):
            for node in nodes.nodes:
                flights = node.exchange._relay(blob).flights()
                shared = [flight for flight in flights if flight.scatter and not flight.is_over]
                if shared:
                    extent = shared[0].extent
                    read.append(node.read(blob, extent, urgent=True))
                    read.append(data[extent.start : extent.stop])
                    return

    faulting = threading.Thread(target=fault)
    faulting.start()
    try:
        assert nodes.load_all(blob) == [data] * 5
    finally:
        over.set()
        faulting.join(60)
    assert len(read) == 2
    assert read[0] == read[1]


# The sender's side


def test_a_chunk_is_the_last_when_most_others_have_read_all_of_theirs(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(1)
    blob, _ = nodes.put(s3, 6 * MIB)
    (node,) = nodes.nodes
    relay = node.exchange._relay(blob)
    for other in "abc":
        node.told.everybody[other] = Member(other, "127.0.0.1", 1, "")
        relay.crowd.add(other, True, bytes(relay.n_chunks), 0)
    own = [i for i in range(relay.n_chunks) if relay.reader(i) == node.name]
    theirs = [[i for i in range(relay.n_chunks) if relay.reader(i) == other] for other in "ab"]
    whole = range(relay.n_chunks)

    def is_last_with(*missing: int) -> bool:
        relay._let_go, relay._first_missing = set(whole) - set(missing), 0
        return relay.is_last(own[-1])

    assert is_last_with(own[-1])
    assert is_last_with(own[-1], theirs[0][-1]), "two of four have nothing to do"
    assert not is_last_with(own[-1], theirs[0][-1], theirs[1][-1])
    assert not is_last_with(own[-1], theirs[0][-1], own[-2]), "this node has more to read"
    node.told.suspect("c", "the test says so")
    view = relay.view()
    more = [i for i in whole if view.homes.home(i) == "c" and acting_home(view, i) == node.name]
    assert not is_last_with(own[-1], more[0]), "nor what it reads for one that died"


def test_nobody_who_is_asked_for_a_digest_waits_for_it(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(1)
    blob, _ = nodes.put(s3, MIB)
    relay = nodes.nodes[0].exchange._relay(blob)
    flight, _ = relay.board(0)
    flight.begin(Memory(len(flight.extent)))  # type: ignore[arg-type]
    flight.advance(len(flight.extent))
    landing = threading.Timer(0.2, flight.land, (b"digest",))
    landing.start()
    assert relay.digest(0) is None
    landing.join()
    assert relay.digest(0) == b"digest"


def test_a_home_that_still_hashes_what_it_shared_is_asked_again(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = cluster(2)
    blob, _ = nodes.put(s3, MIB)
    relay = nodes.nodes[0].exchange._relay(blob)
    flight, _ = relay.board(0)
    answers = [Vouched(), Vouched(), Vouched({0: b"d"})]
    monkeypatch.setattr(bringing, "ask_digests", lambda *asked: answers.pop(0))
    (home,) = nodes.nodes[0].exchange._neighbours.alive().values()
    assert relay._bringer._said(flight, home) == b"d"
    assert not answers


def test_each_receiver_is_told_once() -> None:
    passing = Passing(8 * MIB)
    numbers = [passing.begin(node) for node in "abc"]
    time.sleep(0.1)
    for number in numbers:
        passing.sent(number, BLOCK_BYTES)
    assert passing.scatter(8 * MIB) == ("a", "b", "c")
    assert passing.tell(("a", "b", "c"))
    assert not passing.tell(("b", "c", "d"))
    assert passing.scatter(8 * MIB) == ()


def test_answers_that_are_over_are_nobodys() -> None:
    passing = Passing(8 * MIB)
    numbers = [passing.begin(node) for node in "abcaa"]
    time.sleep(0.1)
    for number in numbers[:3]:
        passing.sent(number, BLOCK_BYTES)
    passing.end(numbers[1])
    assert passing.scatter(8 * MIB) == ()
    for number in (numbers[0], numbers[2], *numbers[3:]):
        passing.end(number)
    passing.sent(passing.begin("d"), BLOCK_BYTES)
    assert passing.scatter(8 * MIB) == ()


def test_it_is_not_looked_at_with_each_piece() -> None:
    passing = Passing(8 * MIB)
    begun_s = time.monotonic()
    looks = sum(passing.is_due() for _ in range(1000))
    assert 1 <= looks <= 2 + (time.monotonic() - begun_s) / 0.05


# The flight


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Memory:
    """A slab."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))

    def hold(self) -> None:
        return

    def release(self) -> None:
        return


def running(size: int) -> Flight:
    """Return a flight that is asked of a home."""
    flight = Flight(Blob("s3://m/w", size, "v1"), 0, Extent(0, size))
    flight.begin(Memory(size))  # type: ignore[arg-type]
    flight.asking = "home"
    return flight


def test_blocks_may_come_in_any_order() -> None:
    flight = running(5 * BLOCK_BYTES + 9)
    flight.advance(BLOCK_BYTES // 2)
    for block, position in ((2, BLOCK_BYTES // 2), (5, BLOCK_BYTES // 2), (1, BLOCK_BYTES // 2)):
        flight.put_block(block)
        assert flight.position == position
    flight.put_block(0)
    assert flight.position == 3 * BLOCK_BYTES
    for block in (4, 3):
        flight.put_block(block)
    assert flight.position == 5 * BLOCK_BYTES + 9


def test_what_lies_beyond_a_gap_may_be_passed_on() -> None:
    flight = running(4 * BLOCK_BYTES)
    flight.put_block(2)
    assert flight.wait_part(2 * BLOCK_BYTES, 3 * BLOCK_BYTES, 0.0)
    assert flight.wait_part(2 * BLOCK_BYTES + 5, 2 * BLOCK_BYTES + 6, 0.0)
    assert not flight.wait_part(2 * BLOCK_BYTES, 3 * BLOCK_BYTES + 1, 0.0)
    assert not flight.wait_part(BLOCK_BYTES, 3 * BLOCK_BYTES, 0.0)


def test_what_came_before_a_flight_began_anew_is_not_there() -> None:
    flight = running(4 * BLOCK_BYTES)
    flight.put_block(2)
    flight.restart()
    assert not flight.wait_part(2 * BLOCK_BYTES, 3 * BLOCK_BYTES, 0.0)


def test_a_chunk_that_a_reader_has_come_to_is_asked_for_again_only_if_it_comes_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(flights, "time", clock)
    fresh, slow, quick, much = (running(4 * BLOCK_BYTES) for _ in range(4))
    for flight in (slow, quick):
        flight.advance(BLOCK_BYTES)
    much.advance(3 * BLOCK_BYTES)
    everything = (fresh, slow, quick, much)
    for flight in everything:
        flight.hurry()
        flight.hurry()  # another reader, at once
    assert all(flight.is_hurried for flight in everything), "bulk gives way to it"
    assert [flight.asks_again for flight in everything] == [True, False, False, False]
    clock.now_s += 0.06
    quick.advance(BLOCK_BYTES // 4)
    for flight in everything:
        flight.hurry()
    assert [flight.asks_again for flight in everything] == [True, True, False, False]
    clock.now_s += 0.06
    quick.hurry()
    assert quick.asks_again, "it came to a halt"


def test_only_bulk_of_the_home_that_says_so_is_shared() -> None:
    scatter = Scatter("home", ("a", "b", "c"))
    shared, other, urgent, whole = (running(BLOCK_BYTES) for _ in range(4))
    other.asking, urgent.urgent, whole.is_whole = "another", True, True
    for flight in (shared, other, urgent, whole):
        flight.share(scatter)
    assert shared.scatter == scatter
    assert [flight.scatter for flight in (other, urgent, whole)] == [None] * 3
