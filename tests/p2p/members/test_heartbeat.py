"""Members come, go, fail, come back and lie, over real sockets."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import LogWatch, SettingsFactory
from tests.p2p.identity.conftest import OTHER_SECRET
from tests.p2p.members.conftest import (
    IdentityFactory,
    MembershipFactory,
    RudeFactory,
    ServerFactory,
    nodes,
    tls_flood,
    until,
)

from weightstream.p2p.identity import Signer, is_node_name
from weightstream.p2p.members import Member, open_membership, policy
from weightstream.p2p.members.hello import parse_hello
from weightstream.p2p.members.line import Answer, LineError, _parse_head

PLAIN = {"peer_encryption": "off"}


@pytest.mark.parametrize("mode", [{}, PLAIN, {"secret": None, **PLAIN}])
def test_members_are_who_answers(
    mode: dict[str, object],
    identity: IdentityFactory,
    hello_server: ServerFactory,
    membership: MembershipFactory,
) -> None:
    me = identity("me", **mode)
    a, b = hello_server("a", zone="z1", **mode), hello_server("b", **mode)
    mine = hello_server("me", **mode)
    mine.identity = me
    one = membership(f"{a.address},{b.address},{mine.address},127.0.0.1:1", me)
    until(lambda: one.is_settled)
    expected = [
        Member(a.identity.node, "127.0.0.1", a.port, "z1"),
        Member(b.identity.node, "127.0.0.1", b.port, ""),
    ]
    assert list(one.members()) == sorted(expected, key=lambda member: member.node)
    until(lambda: a.hellos >= 3)
    assert a.connections == 1
    assert mine.hellos >= 1


def test_settled_means_that_everybody_was_asked(
    hello_server: ServerFactory, rude_server: RudeFactory, membership: MembershipFactory
) -> None:
    a = hello_server("a")
    silent = rude_server(lambda sock: time.sleep(0))
    one = membership(f"{a.address},127.0.0.1:{silent.port}")
    until(one.members)
    assert not one.is_settled
    until(lambda: one.is_settled, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("real_beats")
def test_who_stops_is_out_in_four_seconds_and_back_at_once(
    hello_server: ServerFactory, membership: MembershipFactory
) -> None:
    a, b = hello_server("a"), hello_server("b")
    changes: list[list[str]] = []
    one = membership(f"{a.address},{b.address}")
    one.on_change = lambda: changes.append(nodes(one))
    until(lambda: len(nodes(one)) == 2)
    a.stop()
    stopped_s = time.monotonic()
    # three seconds and up to a beat; the rest is for a busy machine
    until(lambda: nodes(one) == [b.identity.node], 6)
    assert time.monotonic() - stopped_s > 2.5
    a.start()
    until(lambda: len(nodes(one)) == 2, 3)
    until(lambda: len(changes) >= 2)
    assert changes[-1] == nodes(one)


def test_who_hangs_is_out(
    hello_server: ServerFactory, membership: MembershipFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = hello_server("a")
    one = membership(a.address)
    until(one.members)
    hangs, goes_on = threading.Event(), threading.Event()
    real = a.hello

    def hang() -> bytes:
        hangs.set()
        goes_on.wait(20)
        return real()

    monkeypatch.setattr(a, "hello", hang)
    hangs.wait(5)
    until(lambda: not one.members(), 6)
    goes_on.set()
    until(one.members, 3)


def test_a_suspect_is_out_until_its_next_hello(
    hello_server: ServerFactory, membership: MembershipFactory
) -> None:
    a = hello_server("a")
    one = membership(a.address)
    until(one.members)
    before = a.hellos
    one.suspect(a.identity.node, "it sent nothing for a second")
    assert one.members() == () or a.hellos > before
    one.suspect("nobody", "never heard of")
    until(one.members, 3)
    assert a.hellos > before


def test_a_change_is_told_to_who_listens_late(
    hello_server: ServerFactory, membership: MembershipFactory
) -> None:
    one = membership(hello_server("a").address)
    until(one.members)
    told = threading.Event()
    one.on_change = told.set
    assert told.wait(2)


def test_a_listener_that_fails_or_takes_long_stops_nothing(
    hello_server: ServerFactory, membership: MembershipFactory, expect_log: LogWatch
) -> None:
    expect_log("what follows a change of members failed")
    a, b = hello_server("a"), hello_server("b")
    b.stop()
    one = membership(f"{a.address},{b.address}")
    release = threading.Event()
    calls = []

    def listen() -> None:
        calls.append(nodes(one))
        release.wait(10)
        raise RuntimeError("on purpose")

    one.on_change = listen
    until(one.members)
    b.start()
    until(lambda: len(nodes(one)) == 2)
    release.set()
    until(lambda: len(calls) >= 2)


def test_an_error_of_its_own_does_not_end_the_heartbeat(
    hello_server: ServerFactory,
    membership: MembershipFactory,
    expect_log: LogWatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect_log("the heartbeat failed and begins anew")
    a, b = hello_server("a"), hello_server("b")
    one = membership(f"{a.address},{b.address}")
    until(lambda: len(nodes(one)) == 2)
    with monkeypatch.context() as broken:
        broken.setattr(policy, "beat_s", lambda *_: 1 / 0)
        until(lambda: expect_log.messages("begins anew"))
    hellos = a.hellos
    until(lambda: a.hellos > hellos + 2)
    assert len(nodes(one)) == 2


def test_a_peer_of_another_secret_is_none_and_is_reported(
    hello_server: ServerFactory, membership: MembershipFactory, expect_log: LogWatch
) -> None:
    expect_log("certificate is of another secret")
    other = hello_server("other", secret=OTHER_SECRET)
    one = membership(f"{other.address},{hello_server('a').address}")
    until(lambda: one.is_settled)
    until(lambda: other.connections >= 3)
    assert other.identity.node not in nodes(one)
    assert len(nodes(one)) == 1
    assert len(expect_log.messages("another secret")) == 1
    assert other.hellos == 0


def test_a_plain_peer_is_none_where_encryption_is_on(
    hello_server: ServerFactory, membership: MembershipFactory, expect_log: LogWatch
) -> None:
    expect_log.allow("TLS with it fails")
    plain = hello_server("plain", **PLAIN)
    one = membership(plain.address)
    until(lambda: one.is_settled)
    assert one.members() == ()
    assert plain.hellos == 0


def test_a_tls_peer_is_none_where_encryption_is_off(
    hello_server: ServerFactory, membership: MembershipFactory, identity: IdentityFactory
) -> None:
    secure = hello_server("a")
    one = membership(secure.address, identity("me", **PLAIN))
    until(lambda: one.is_settled)
    assert one.members() == ()
    assert secure.hellos == 0


def test_a_peer_that_refuses_the_signature_is_none_and_is_reported(
    hello_server: ServerFactory,
    membership: MembershipFactory,
    identity: IdentityFactory,
    expect_log: LogWatch,
) -> None:
    expect_log("refuses this node: 401 its signature is wrong")
    other = hello_server("other", secret=OTHER_SECRET, **PLAIN)
    one = membership(other.address, identity("me", **PLAIN))
    until(lambda: other.hellos >= 2)
    assert one.members() == ()
    assert len(expect_log.messages("refuses this node")) == 1


def test_a_node_whose_clock_is_wrong_is_told_so(
    hello_server: ServerFactory,
    membership: MembershipFactory,
    identity: IdentityFactory,
    expect_log: LogWatch,
) -> None:
    me, a = identity("me", **PLAIN), hello_server("a", **PLAIN)
    assert me.keys is not None
    late = Signer(me.keys.key("requests"), me.node, lambda: time.time() - 90)
    expect_log(f"refuses this node: 401 it was signed 90 s ago by the clock of {me.node}")
    one = membership(a.address, replace(me, signer=late))
    until(lambda: a.hellos >= 2)
    assert one.members() == ()


def test_a_recorded_hello_is_refused(
    hello_server: ServerFactory, rude_server: RudeFactory, membership: MembershipFactory,
    identity: IdentityFactory,
) -> None:  # fmt: skip
    a = hello_server("a", **PLAIN)
    recorded: list[bytes] = []
    listens = rude_server(lambda sock: recorded.append(sock.recv(4096)))
    membership(f"127.0.0.1:{listens.port}", identity("me", **PLAIN))
    until(lambda: recorded)

    def replay() -> bytes:
        with socket.create_connection(("127.0.0.1", a.port), 5) as sock:
            sock.sendall(recorded[0])
            return sock.recv(4096)

    # Heard on its way to another node, it is good once elsewhere: only TLS keeps listeners out.
    assert replay().startswith(b"HTTP/1.1 200")
    assert replay().startswith(b"HTTP/1.1 401")


def test_one_name_at_two_nodes_is_reported_once_and_the_later_left_out(
    hello_server: ServerFactory,
    membership: MembershipFactory,
    identity: IdentityFactory,
    expect_log: LogWatch,
) -> None:
    expect_log("two nodes are called a-copied")
    first, copy = hello_server("a"), hello_server("b")
    first.answers = copy.answers = {"node": "a-copied"}
    copy.stop()
    one = membership(f"{first.address},{copy.address}")
    until(one.members)
    copy.start()
    until(lambda: expect_log.messages("two nodes are called"))
    hellos = copy.hellos
    until(lambda: copy.hellos >= hellos + 2)
    assert [m.port for m in one.members()] == [first.port]
    assert len(expect_log.messages("two nodes are called")) == 1
    first.stop()
    until(lambda: [m.port for m in one.members()] == [copy.port], 6)


def test_a_copy_of_ones_own_store_is_reported(
    hello_server: ServerFactory,
    membership: MembershipFactory,
    identity: IdentityFactory,
    expect_log: LogWatch,
) -> None:
    me = identity("me")
    expect_log(f"two nodes are called {me.node}: this node and")
    copy = hello_server("me")
    assert copy.identity.node == me.node
    one = membership(copy.address, me)
    until(lambda: copy.hellos >= 2)
    assert one.members() == ()


def test_one_process_at_two_addresses_is_one_member(
    hello_server: ServerFactory, membership: MembershipFactory
) -> None:
    first = hello_server("a")
    second = hello_server("a", "127.0.0.2")
    second.stop()
    second.identity = first.identity
    second.start()
    one = membership(f"{first.address},{second.address}")
    until(lambda: first.hellos >= 3 and second.hellos >= 3)
    assert len(one.members()) == 1


def test_a_node_that_moves_is_found_at_its_new_address(
    hello_server: ServerFactory, membership: MembershipFactory
) -> None:
    first, second = hello_server("a"), hello_server("a", "127.0.0.2")
    second.stop()
    one = membership(f"{first.address},{second.address}")
    until(one.members)
    first.stop()
    second.start()
    until(lambda: [m.host for m in one.members()] == ["127.0.0.2"], 4)


def drip(sock: socket.socket) -> None:
    sock.recv(4096)
    while True:
        sock.sendall(b"H")
        time.sleep(0.05)


def answer(body: bytes, head: bytes = b"HTTP/1.1 200 OK") -> Callable[[socket.socket], object]:
    def talk(sock: socket.socket) -> None:
        while sock.recv(4096):
            sock.sendall(head + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    return talk


def flood(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 65536)


def said(data: bytes) -> Callable[[socket.socket], object]:
    def talk(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    return talk


RUDE = {
    "silent": lambda sock: sock.recv(4096),
    "drip": drip,
    "flood": flood,
    "endless head": lambda sock: sock.sendall(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 9000),
    "closed": lambda sock: sock.close(),
    "cut": said(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{"),
    "no length": said(b"HTTP/1.1 200 OK\r\n\r\n{}"),
    "two lengths": said(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} "),
    "chunked": said(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "more than it says": said(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}{}"),
    "negative": said(b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}"),
    "not found": answer(b"", b"HTTP/1.1 404 Not Found"),
    "moved": answer(b'{"node": "a"}', b"HTTP/1.1 307 Elsewhere"),
    "no JSON": answer(b"<html>"),
    "no UTF-8": answer(b'{"node": "\xff"}'),
    "deep": answer(b"[" * 16000),
    "list": answer(b"[]"),
    "number": answer(b"1" * 9000),
    "no node": answer(b'{"zone": "z"}'),
    "bad node": answer(b'{"node": "../../etc"}'),
    "long node": answer(b'{"node": "%s"}' % (b"a" * 200)),
    "bad zone": answer(b'{"node": "a", "zone": {"x": 1}}'),
    "zone of lines": answer(b'{"node": "a", "zone": "z\\n2026 ERROR"}'),
    "old": said(b"HTTP/0.9 hello"),
    "ssh": lambda sock: sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"),
}


def test_rude_answers_are_failures_and_delay_nobody(
    hello_server: ServerFactory,
    rude_server: RudeFactory,
    membership: MembershipFactory,
    identity: IdentityFactory,
) -> None:
    servers = [rude_server(rude) for rude in RUDE.values()]
    good = hello_server("good", **PLAIN)
    addresses = [f"127.0.0.1:{server.port}" for server in servers]
    one = membership(",".join([*addresses, good.address]), identity("me", **PLAIN))
    until(lambda: one.is_settled)
    until(lambda: good.hellos >= 4)
    assert nodes(one) == [good.identity.node]
    until(lambda: all(server.connections >= 2 for server in servers))


def test_rude_answers_under_tls_are_failures(
    hello_server: ServerFactory,
    rude_server: RudeFactory,
    membership: MembershipFactory,
    identity: IdentityFactory,
    expect_log: LogWatch,
) -> None:
    expect_log.allow("TLS with it fails")
    context = identity("rude").server_context()
    assert context is not None
    noise = random.Random(1)
    servers = [rude_server(tls_flood(context)), rude_server(lambda sock: sock.recv(1))]
    servers += [rude_server(said(noise.randbytes(300))) for _ in range(8)]
    servers += [rude_server(said(b"\x16\x03\x03\x40\x00\x02" + bytes(64))) for _ in range(2)]
    good = hello_server("good")
    addresses = [f"127.0.0.1:{server.port}" for server in servers]
    one = membership(",".join([*addresses, good.address]))
    until(lambda: one.is_settled)
    until(lambda: good.hellos >= 3)
    assert nodes(one) == [good.identity.node]


def test_random_answers_never_end_the_heartbeat(
    hello_server: ServerFactory,
    rude_server: RudeFactory,
    membership: MembershipFactory,
    identity: IdentityFactory,
) -> None:
    noise = random.Random(7)
    whole = (
        b'HTTP/1.1 200 OK\r\nContent-Length: 42\r\n\r\n{"node": "a-00112233", "zone": "", "x": 12}'
    )

    def spoil(sock: socket.socket) -> None:
        sock.recv(4096)
        data = bytearray(whole)
        for _ in range(noise.randrange(1, 6)):
            data[noise.randrange(len(data))] = noise.randrange(256)
        cut = noise.randrange(len(data))
        sock.sendall(data[:cut])
        sock.sendall(data[cut:])
        sock.close()

    servers = [rude_server(spoil) for _ in range(40)]
    good = hello_server("good", **PLAIN)
    addresses = [f"127.0.0.1:{server.port}" for server in servers]
    one = membership(",".join([*addresses, good.address]), identity("me", **PLAIN))
    until(lambda: good.hellos >= 3)
    assert good.identity.node in nodes(one)
    assert set(one.members()) >= {Member(good.identity.node, "127.0.0.1", good.port, "")}


def test_closing_does_not_wait_for_a_peer(
    rude_server: RudeFactory, identity: IdentityFactory, store_settings: SettingsFactory
) -> None:
    silent = rude_server(lambda sock: sock.recv(1))
    one = open_membership(store_settings(peers=f"127.0.0.1:{silent.port}"), identity("me"), 1)
    until(lambda: silent.connections)
    begun_s = time.monotonic()
    one.close()
    one.close()
    assert time.monotonic() - begun_s < 2
    assert not [t for t in threading.enumerate() if t.name.startswith("peers-")]
    one.suspect("a", "closed already")


def test_fifty_members(
    hello_server: ServerFactory, membership: MembershipFactory, identity: IdentityFactory
) -> None:
    servers = [hello_server(f"n{i}", secret=None, **PLAIN) for i in range(50)]
    me = identity("me", None, **PLAIN)
    one = membership(",".join(server.address for server in servers), me)
    until(lambda: len(one.members()) == 50)
    assert nodes(one) == sorted(server.identity.node for server in servers)
    until(lambda: min(server.hellos for server in servers) >= 3)
    assert {server.connections for server in servers} == {1}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["node", "zone", "version", "instance"]), inner)
    ),
    max_leaves=8,
)


@given(status=st.integers(100, 599), found=JSON, raw=st.binary(max_size=30))
def test_a_hello_is_understood_or_refused(status: int, found: Any, raw: bytes) -> None:
    for body in (json.dumps(found).encode(), raw):
        try:
            hello = parse_hello(Answer(status, body), None)
        except LineError:
            continue
        assert is_node_name(hello.node)
        assert (hello.zone + hello.version + hello.instance).isprintable()


def test_a_nested_hello_is_not_even_parsed() -> None:
    with pytest.raises(LineError, match="nested"):
        parse_hello(Answer(200, b"[" * 16_000), None)


@given(head=st.binary(max_size=80) | st.lists(
    st.sampled_from([
        b"HTTP/1.1 200 OK", b"HTTP/1.0 204", b"Content-Length: 7", b"Content-Length: -7", b":",
        b"content-length:", b"Content-Length: 9999999999999", b"Connection: close", b"\xff: \x00",
    ]), max_size=6,
).map(b"\r\n".join))  # fmt: skip
def test_a_head_is_understood_or_refused(head: bytes) -> None:
    try:
        found = _parse_head(head)
    except LineError:
        return
    assert 100 <= found.status < 600
    assert 0 <= found.length < 10**12
