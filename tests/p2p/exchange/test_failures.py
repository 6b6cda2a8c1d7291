"""Peers that die, hang, lie or talk nonsense cost time, never a byte."""

import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from blake3 import blake3
from tests.conftest import LogWatch
from tests.kit import faults as f
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import MIB, Cluster, ClusterFactory, Node
from tests.p2p.exchange.liar import Answer, Liar, give

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch.job import Attempt
from weightstream.cachefs.fetch.source import Source, Transfer
from weightstream.errors import UnavailableError, WeightstreamError
from weightstream.p2p.exchange import joining
from weightstream.p2p.exchange.flights import FlightState
from weightstream.p2p.members import Member

CHUNK = 256 << 10


def with_liar(nodes: Cluster, blob: Blob, answer: Answer) -> Liar:
    """Add a peer that says it holds everything."""
    chunk_size = nodes.nodes[0].settings.chunk_size
    liar = Liar("liar", -(-blob.size // chunk_size), answer)
    for node in nodes.nodes:
        node.told.everybody["liar"] = Member("liar", "127.0.0.1", liar.port, "")
    return liar


def flipped(data: bytes, chunk: int) -> bytes:
    piece = bytearray(data[chunk * CHUNK : (chunk + 1) * CHUNK])
    piece[len(piece) // 2] ^= 1
    return bytes(piece)


def test_flipped_bits_are_never_seen_and_their_sender_is_banned(
    cluster: ClusterFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = cluster(2)
    blob, data = nodes.put(s3, 3 * MIB)
    right = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]

    def answer(sock: socket.socket, chunk: int) -> None:
        digest = give(right[chunk])[-32:]
        sock.sendall(give(flipped(data, chunk), digest))

    expect_log("peer liar at .* sent wrong bytes of .*w.bin bytes .*: not asked again")
    with with_liar(nodes, blob, answer) as liar:
        assert nodes.load_all(blob) == [data, data]
        asked = len(liar.asked)
        assert asked > 0
        assert nodes.nodes[0].load(blob) == data
        assert len(liar.asked) == asked, "it was asked again"


def test_who_passed_on_what_was_wrong_is_asked_again_and_not_taken_for_dead(
    cluster: ClusterFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = cluster(2, chunk_size=4 * MIB)
    blob, data = nodes.put(s3, 24 * MIB)
    wary, trusting = nodes.nodes

    def answer(sock: socket.socket, chunk: int) -> None:
        piece = data[chunk * 4 * MIB : (chunk + 1) * 4 * MIB]
        said = give(piece[:-1] + bytes([piece[-1] ^ 1]), blake3(piece).digest())
        sock.sendall(said[: 3 * MIB])
        time.sleep(0.5)  # what has come is passed on
        sock.sendall(said[3 * MIB :])

    expect_log("peer liar at .* sent wrong bytes of .*w.bin bytes .*: not asked again")
    with with_liar(nodes, blob, answer) as liar:
        wary.allowed = False  # so that the other is to bring it all
        wary.exchange._neighbours.ban("liar")
        assert nodes.load_all(blob) == [data, data]
        assert liar.asked
    assert trusting.name not in wary.told.suspected
    assert nodes.origin_bytes(blob) == blob.size


def test_what_was_found_wrong_as_a_whole_is_read_from_the_origin(
    cluster: ClusterFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = cluster(1)
    blob, data = nodes.put(s3, 3 * MIB)

    def answer(sock: socket.socket, chunk: int) -> None:
        sock.sendall(give(flipped(data, chunk)))

    with with_liar(nodes, blob, answer) as liar:
        assert nodes.nodes[0].load(blob) != data
        assert liar.asked
        expect_log("w.bin came wrong from peers: it is read from the origin from now on")
        nodes.nodes[0].exchange.refute(blob)
        asked = len(liar.asked)
        assert nodes.nodes[0].load(blob) == data
        assert nodes.nodes[0].read(blob) == data
        assert len(liar.asked) == asked


def test_what_is_found_wrong_in_mid_load_is_nowhere_afterwards(
    cluster: ClusterFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = cluster(1)
    blob, data = nodes.put(s3, 4 * MIB)
    node = nodes.nodes[0]

    def answer(sock: socket.socket, chunk: int) -> None:
        sock.sendall(give(flipped(data, chunk))[: CHUNK // 2])
        time.sleep(0.3)  # and hangs up

    with with_liar(nodes, blob, answer) as liar:
        plan = node.exchange.plan([(blob, (blob.whole(),))])
        until_s = time.monotonic() + 20
        while len(liar.asked) < 3:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        expect_log("w.bin came wrong from peers")
        node.exchange.refute(blob)
        assert node.read(blob) == data
        time.sleep(0.5)  # what was on its way is over
        assert node.read(blob) == data
        plan.close()
    relay = node.exchange._relay(blob)
    landed = sum(len(f.extent) for f in relay.flights() if f.state is FlightState.LANDED)
    assert node.exchange._shelf.landed_bytes == landed, "some memory is counted twice"


@pytest.mark.parametrize(
    "what",
    ["hang up", "hang", "half", "garbage", "endless head", "too long", "nothing but 102", "503"],
)
def test_an_answer_that_is_none_is_got_elsewhere(
    cluster: ClusterFactory, s3: S3Server, what: str
) -> None:
    nodes = cluster(2)
    blob, data = nodes.put(s3, 2 * MIB)
    over = threading.Event()

    def answer(sock: socket.socket, chunk: int) -> None:
        body = data[chunk * CHUNK : (chunk + 1) * CHUNK]
        match what:
            case "hang":
                over.wait(20)
            case "half":
                sock.sendall(give(body)[: CHUNK // 2])
            case "garbage":
                sock.sendall(bytes(range(256)) * 64)
            case "endless head":
                sock.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 4096)
            case "too long":
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + body)
            case "nothing but 102":
                until = time.monotonic() + 20
                while time.monotonic() < until and not over.wait(0.1):
                    sock.sendall(b"HTTP/1.1 102 Processing\r\nWaits: nobody\r\n\r\n")
            case "503":
                sock.sendall(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n")

    with with_liar(nodes, blob, answer) as liar:
        try:
            assert nodes.load_all(blob) == [data, data]
        finally:
            over.set()
        assert liar.asked


def test_a_node_that_ends_in_the_middle_is_stood_in_for(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(4)
    blob, data = nodes.put(s3, 8 * MIB)
    nodes.proxy.add(f.When(key="w.bin", ranged=True, times=None), f.Drip(2 * MIB))
    dying = nodes.nodes[3]
    threading.Timer(0.8, dying.exchange.close).start()
    results: list[bytes] = []
    loader = threading.Thread(target=lambda: results.extend(nodes.load_all(blob, nodes.nodes[:3])))
    broken = threading.Thread(target=lambda: _fails(nodes, blob))
    for thread in (loader, broken):
        thread.start()
    for thread in (loader, broken):
        thread.join(60)
    assert results == [data] * 3
    assert nodes.origin_bytes(blob) <= 1.6 * blob.size


def _fails(nodes: Cluster, blob: Blob) -> None:
    with pytest.raises(WeightstreamError):
        nodes.load_all(blob, nodes.nodes[3:])


def test_without_the_origin_the_cluster_serves_what_it_has(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(3)
    blob, data = nodes.put(s3, 3 * MIB)
    assert nodes.nodes[0].load(blob) == data
    nodes.proxy.add(f.When(key="w.bin", times=None), f.FORBIDDEN)
    assert nodes.load_all(blob) == [data] * 3


def test_without_the_origin_the_only_holder_is_asked_even_if_it_is_slow(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(3)
    blob, data = nodes.put(s3, 3 * MIB)
    holder, *others = nodes.nodes
    assert holder.load(blob) == data
    nodes.proxy.add(f.When(key="w.bin", times=None), f.FORBIDDEN)
    for node in others:
        node.exchange._neighbours.dawdle(holder.name)
    assert nodes.load_all(blob, others) == [data] * 2


class Trickle:
    """A source that gives 4 KiB five times a second."""

    name = "trickle"

    def __init__(self, source: Source) -> None:
        self._source = source
        self.begun = self.ended = 0
        self.closed = threading.Event()

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        self.begun += 1
        data = bytearray(len(into))
        self._source.read_into(
            blob, start, memoryview(data), Attempt(lambda n: None, lambda: False)
        )
        for at in range(0, len(into), 4096):
            if self.closed.wait(0.2):
                raise UnavailableError("closed")
            into[at : at + 4096] = data[at : at + 4096]
            transfer.advance(min(4096, len(into) - at))
        self.ended += 1


def test_a_home_that_the_swarm_found_slow_is_not_waited_for(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "_BATCH_S", 0.4)  # on a busy machine one would begin alone
    nodes = cluster(3)
    blob, data = nodes.put(s3, 3 * MIB)
    home, *others = nodes.nodes
    home.source = trickle = Trickle(home.origin)
    for node in others:
        node.exchange._neighbours.dawdle(home.name)
        # All but what it has begun is taken over from it, and it is to begin something.
        take = node.exchange._bulk.take
        node.exchange._bulk.take = lambda take=take: bool(trickle.begun) and take()  # type: ignore[method-assign, misc]
    loader = threading.Thread(target=ending_badly, args=(home, blob), daemon=True)
    loader.start()
    try:
        assert nodes.load_all(blob, others) == [data] * 2
        assert trickle.begun, "it was no home"
        assert not trickle.ended, "they waited for it"
    finally:
        trickle.closed.set()
        home.exchange.close()
        loader.join(30)


def ending_badly(node: Node, blob: Blob) -> None:
    with suppress(WeightstreamError):
        node.load(blob)


def test_a_fault_of_who_may_not_read_the_origin_is_asked_of_a_slow_holder(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(2)
    blob, data = nodes.put(s3, 1 * MIB)
    holder, other = nodes.nodes
    assert holder.load(blob) == data
    other.allowed = False
    other.exchange._neighbours.dawdle(holder.name)
    into = memoryview(bytearray(CHUNK))
    other.exchange.read_into(blob, 0, into, Attempt(lambda count: None, lambda: True))
    assert bytes(into) == data[:CHUNK]


def test_without_the_origin_and_without_a_chunk_the_error_says_so(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(2)
    blob, _ = nodes.put(s3, 2 * MIB)
    nodes.proxy.add(f.When(key="w.bin", times=None), f.FORBIDDEN)
    with pytest.raises(WeightstreamError, match=r"w\.bin"):
        nodes.load_all(blob)


def test_another_version_is_never_mixed_in(cluster: ClusterFactory, s3: S3Server) -> None:
    nodes = cluster(2)
    old, data = nodes.put(s3, 2 * MIB)
    assert nodes.nodes[0].load(old) == data
    s3.put_files(nodes.bucket, {"w.bin": bytes(reversed(data))})
    (new,) = nodes.nodes[1].origin.list(old.uri)
    assert new.version != old.version
    assert nodes.nodes[1].load(new) == bytes(reversed(data))
    assert nodes.nodes[1].load(old) == data, "the other node still has it"


def test_who_may_not_read_the_origin_gets_it_from_those_who_may(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(3)
    blob, data = nodes.put(s3, 3 * MIB)
    nodes.nodes[2].allowed = False
    assert nodes.load_all(blob) == [data] * 3
    assert nodes.origin_bytes(blob) <= 1.1 * blob.size


def test_a_uri_that_nobody_here_reads_is_not_fetched_for_a_peer(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(2)
    blob, _ = nodes.put(s3, MIB)
    nodes.nodes[0].allowed = False
    nodes.nodes[1].allowed = False
    with pytest.raises(WeightstreamError, match="may not read its origin"):
        nodes.load_all(blob)
    assert nodes.origin_bytes(blob) == 0


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /v1/chunk/../../etc/passwd/1/1 HTTP/1.1\r\n\r\n",
        b"GET /v1/chunk/" + b"0" * 32 + b"/262144/99999999999999999999 HTTP/1.1\r\n\r\n",
        b"GET /v1/chunk/" + b"0" * 32 + b"/262144/-1 HTTP/1.1\r\n\r\n",
        b"POST /v1/join HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /v1/join HTTP/1.1\r\nContent-Length: 5\r\n\r\n[1,2]",
        b'POST /v1/join HTTP/1.1\r\nContent-Length: 13\r\n\r\n{"node":null}',
        b"POST /v1/join HTTP/1.1\r\nContent-Length: nan\r\n\r\n",
        b"POST /v1/take HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        b'POST /v1/take HTTP/1.1\r\nContent-Length: 22\r\n\r\n{"node":"a","blob":""}',
        b"A" * 100_000,
        bytes(range(256)) * 40,
    ],
)
def test_garbage_on_the_port_is_hung_up_on(
    cluster: ClusterFactory, s3: S3Server, sent: bytes
) -> None:
    nodes = cluster(1)
    port = nodes.nodes[0].exchange.port
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.settimeout(15)
        heard = b""
        with suppress(OSError):  # it may hang up before all was sent
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            while more := sock.recv(4096):
                heard += more
    assert b" 200 " not in heard
    blob, data = nodes.put(s3, MIB)
    assert nodes.nodes[0].load(blob) == data


def test_a_chunk_that_is_not_what_was_published_is_got_from_the_origin(
    cluster: ClusterFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = cluster(2)
    blob, data = nodes.put(s3, 2 * MIB)
    assert nodes.nodes[0].load(blob) == data
    before = nodes.origin_bytes(blob)
    reader = nodes.nodes[1].exchange
    published = bytes(32)
    wrong = replace(reader._parts, digest_of=lambda blob, size, chunk: published)
    reader._parts = wrong
    expect_log("w.bin bytes .* of peer .* is not what was published")
    assert nodes.nodes[1].load(blob) == data
    assert nodes.origin_bytes(blob) - before == blob.size
