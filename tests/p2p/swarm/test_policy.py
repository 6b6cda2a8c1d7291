"""Who is blamed, whom a node connects to, how a blob is cut, who is admitted."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.cachefs.blob import Blob
from weightstream.p2p.members import Member
from weightstream.p2p.swarm.addresses import Addresses
from weightstream.p2p.swarm.frames import FrameError, receive, send
from weightstream.p2p.swarm.policy import Rate, Verdict, dawdlers, friends, senders_of, verdict
from weightstream.p2p.swarm.torrent import Shape, describe

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("stands_by", "strikes", "expected"),
    [
        (False, 1, Verdict.NOTHING),
        (False, 2, Verdict.NOTHING),
        (False, 3, Verdict.LEFT_OUT),
        (True, 1, Verdict.BANNED),
    ],
)
def test_who_stands_by_wrong_bytes_is_banned_others_are_left_out_in_time(
    stands_by: bool, strikes: int, expected: Verdict
) -> None:
    assert verdict(stands_by, strikes) is expected


def test_only_who_sent_a_wrong_block_is_blamed() -> None:
    senders = {4: {"a": [0, 1], "b": [2]}, 5: {"b": [0]}}
    assert senders_of({4: {2}}, senders) == {"b"}
    assert senders_of({4: {0, 2}}, senders) == {"a", "b"}
    assert senders_of({5: {1}, 6: {0}}, senders) == frozenset()
    assert senders_of({}, senders) == frozenset()


def test_a_trickle_is_not_keeping_up() -> None:
    rate = Rate()
    assert not rate.keeps_up, "nothing came yet"
    for _ in range(20):
        rate = rate.after(6 * MIB, 0.25)
        assert rate.keeps_up
    for _ in range(4):  # a pause of a second is none
        rate = rate.after(0, 0.25)
    assert rate.keeps_up
    for _ in range(20):
        rate = rate.after(MIB // 2, 0.25)
    assert not rate.keeps_up, "a twelfth of what came before"


def test_few_slow_homes_are_stood_in_for_and_many_are_not() -> None:
    assert dawdlers(["a", "a", "a"], 8) == {"a"}
    assert dawdlers(["a", "b", "a"], 8) == {"a", "b"}
    assert dawdlers(["a", "b", "c"], 8) == frozenset(), "the swarm is slow, not they"
    assert dawdlers(["a"], 3) == frozenset()
    assert dawdlers([], 8) == frozenset()


def test_a_small_crowd_is_a_mesh_and_a_large_one_hangs_together() -> None:
    nodes = [f"n{i}" for i in range(500)]
    assert set(friends("n0", nodes[:30])) == set(nodes[1:30])
    near = {node: friends(node, nodes) for node in nodes}
    assert all(len(found) == 40 for found in near.values())
    reached, edge = {"n0"}, ["n0"]
    while edge:
        edge = [other for node in edge for other in near[node] if other not in reached]
        reached.update(edge)
    assert reached == set(nodes)


@given(st.integers(1, 200 * MIB), st.sampled_from([64 * KIB, MIB, 3 * MIB, 8 * MIB, 48 * KIB]))
def test_pieces_cover_each_byte_once_and_never_cross_chunks(size: int, chunk_size: int) -> None:
    shape = Shape(size, chunk_size)
    n_chunks = -(-size // chunk_size)
    pieces = [piece for chunk in range(n_chunks) for piece in shape.pieces(chunk)]
    assert pieces == list(range(shape.n_pieces))
    for chunk in (0, n_chunks - 1):
        extents = [shape.piece(i) for i in shape.pieces(chunk)]
        assert extents[0].start == chunk * chunk_size
        assert extents[-1].stop == min((chunk + 1) * chunk_size, size)
        assert {shape.chunk(i) for i in shape.pieces(chunk)} == {chunk}


def test_each_version_of_each_blob_under_each_secret_is_another_torrent() -> None:
    shape, key = Shape(10 * MIB, MIB), b"k" * 32
    blob = Blob("s3://models/w", 10 * MIB, "v1")
    found = [
        describe(blob, shape, key),
        describe(Blob("s3://models/w", 10 * MIB, "v2"), shape, key),
        describe(Blob("s3://models/x", 10 * MIB, "v1"), shape, key),
        describe(blob, shape, b"l" * 32),
    ]
    assert len(set(found)) == len(found)
    assert describe(blob, shape, key) == found[0]
    assert b"7:privatei1e" in found[0]
    assert all(b"models" not in one for one in found), "a name is told to who listens"


def test_a_member_is_admitted_until_it_is_gone_for_a_while() -> None:
    asked: list[str] = []

    def resolve(host: str) -> tuple[str, ...]:
        asked.append(host)
        return {"a": ("10.0.0.1", "fd00::1"), "b": ("10.0.0.2",)}.get(host, ())

    addresses = Addresses(resolve)
    a, b, lost = (Member(node, node, 7470) for node in ("a", "b", "lost"))
    assert addresses.admitted([a, b, lost], 0.0) == {"10.0.0.1", "fd00::1", "10.0.0.2"}
    assert addresses.admitted([a, lost], 9.0) == {"10.0.0.1", "fd00::1", "10.0.0.2"}
    assert addresses.admitted([a, lost], 11.0) == {"10.0.0.1", "fd00::1"}
    assert asked == ["a", "b", "lost"], "names are not asked for at each look"
    addresses.admitted([a], 61.0)
    assert asked == ["a", "b", "lost", "a"]


def test_messages_arrive_as_they_were_sent() -> None:
    one, other = socket.socketpair()
    with one, other:
        send(one, {"op": "piece", "piece": 3}, b"bytes")
        send(one, {"op": "remove"})
        assert receive(other) == ({"op": "piece", "piece": 3}, b"bytes")
        assert receive(other) == ({"op": "remove"}, b"")
        one.sendall(struct.pack("!II", 5, 100) + b'{"a":')
        one.close()
        assert receive(other) is None, "half a message"


@pytest.mark.parametrize("head", [(1 << 31, 0), (2, 1 << 31)])
def test_a_message_without_bounds_is_refused(head: tuple[int, int]) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(struct.pack("!II", *head))
        with pytest.raises(FrameError):
            receive(other)
