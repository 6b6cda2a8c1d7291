"""What the setting `peers` may say, and how its addresses change."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import LogWatch, SettingsFactory
from tests.p2p.members.conftest import (
    IdentityFactory,
    MembershipFactory,
    ServerFactory,
    nodes,
    until,
)

from weightstream.errors import UsageError
from weightstream.p2p.members import Heartbeats, Member, StaticMembers, open_membership, sources
from weightstream.p2p.members.addresses import Address, parse_address

PLAIN = {"peer_encryption": "off"}


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:7470", Address("10.0.0.1", 7470)),
        (" node-3.example.:1 ", Address("node-3.example.", 1)),
        ("[::1]:65535", Address("::1", 65535)),
        ("under_score:80", Address("under_score", 80)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text, "setting peers") == address
    assert parse_address(str(address), "setting peers") == address


@pytest.mark.parametrize(
    "peers",
    [
        ",",
        "host",
        "host:",
        ":7470",
        "host:0",
        "host:65536",
        "host:-1",
        "host:٣",
        "::1:7470",
        "[::1]",
        "a b:1",
        "-a:1",
        "a/b:1",
        "a:1,b",
        "http://a:1",
        "dns:",
        "dns:name",
        "dns:name:port",
        "file:",
        "file:/nowhere/at/all",
        "tracker:",
        "tracker:host:7472",
        "tracker:ftp://host:7472",
        "tracker:http://host:99999",
        "tracker:http://user:word@host:7472",
        "tracker:http://host:7472/path",
        "tracker:http://host:7472?x=y",
        "tracker:http://[::1",
    ],
)
def test_what_makes_no_sense_is_refused(
    peers: str, identity: IdentityFactory, store_settings: SettingsFactory
) -> None:
    me = identity("me", None, **PLAIN)
    with pytest.raises(UsageError, match="setting peers") as refused:
        open_membership(store_settings(peers=peers), me, 1)
    assert "\n" not in str(refused.value)
    assert "word" not in str(refused.value)


def test_a_bad_peer_address_is_refused(
    identity: IdentityFactory, store_settings: SettingsFactory
) -> None:
    settings = store_settings(peers="tracker:http://127.0.0.1:1", peer_address="host")
    with pytest.raises(UsageError, match="setting peer_address"):
        open_membership(settings, identity("me", None, **PLAIN), 1)


def test_a_file_is_followed(
    tmp_path: Path,
    hello_server: ServerFactory,
    membership: MembershipFactory,
    expect_log: LogWatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources.FileSource, "every_s", 0.05)
    monkeypatch.setattr(sources, "_AFTER_FAILURE_S", 0.1)
    a, b = hello_server("a"), hello_server("b")
    path = tmp_path / "peers"
    path.write_text(f"# the peers\n\n{a.address}  # the first\n")
    one = membership(f"file:{path}")
    until(lambda: nodes(one) == [a.identity.node])
    assert one.is_settled

    path.write_text(f"{a.address}\n{b.address}\n{b.address}\n")
    until(lambda: len(nodes(one)) == 2)

    expect_log(f"setting peers, {path}:2: 'what is this': it is host:port; .* are kept")
    path.write_text(f"{a.address}\nwhat is this\n")
    until(lambda: expect_log.messages("what is this"))
    assert len(nodes(one)) == 2

    new = tmp_path / "new"
    new.write_text(f"{b.address}\n")
    os.replace(new, path)
    until(lambda: nodes(one) == [b.identity.node])

    expect_log("cannot read .*peers: .*No such file")
    path.unlink()
    until(lambda: expect_log.messages("No such file"))
    assert nodes(one) == [b.identity.node]
    path.write_text("")
    until(lambda: nodes(one) == [])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a:1\n" * 300_000, b"host\n"])
def test_a_spoilt_file_is_refused_at_the_start(
    content: bytes, tmp_path: Path, identity: IdentityFactory, store_settings: SettingsFactory
) -> None:
    path = tmp_path / "peers"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="setting peers"):
        open_membership(store_settings(peers=f"file:{path}"), identity("me", None, **PLAIN), 1)


class NameServer:
    """Stands in for the resolver, which a test cannot set up without owning the machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers: dict[str, list[str]] = {}
        self.real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.answer)
        monkeypatch.setattr(sources, "_NAMES_S", 0.1)
        monkeypatch.setattr(sources.NameSource, "every_s", 0.1)

    def answer(self, host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if host not in ("peers.test", "node.test"):
            return self.real(host, port, *more, **named)
        if not self.numbers.get(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (number, port)) for number in self.numbers[host]]


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> NameServer:
    return NameServer(monkeypatch)


def test_every_number_of_a_name_is_asked_and_asked_for_again(
    name_server: NameServer,
    hello_server: ServerFactory,
    membership: MembershipFactory,
    expect_log: LogWatch,
) -> None:
    a = hello_server("a")
    b, c = hello_server("b", "127.0.0.2"), hello_server("c", "127.0.0.3")
    for server in (b, c):
        server.stop()
        server.port = a.port
        server.start()
    name_server.numbers["peers.test"] = ["127.0.0.1", "127.0.0.2"]
    one = membership(f"dns:peers.test:{a.port}")
    until(lambda: nodes(one) == sorted([a.identity.node, b.identity.node]))
    name_server.numbers["peers.test"] = ["127.0.0.2", "127.0.0.3"]
    until(lambda: nodes(one) == sorted([b.identity.node, c.identity.node]))
    expect_log("peers.test cannot be resolved: .*; the members known before are kept")
    name_server.numbers["peers.test"] = []
    until(lambda: expect_log.messages("cannot be resolved"))
    assert len(nodes(one)) == 2


def test_a_name_that_is_nobody_settles(
    name_server: NameServer, membership: MembershipFactory, expect_log: LogWatch
) -> None:
    expect_log("peers.test cannot be resolved")
    one = membership("dns:peers.test:7470")
    until(lambda: one.is_settled)
    assert one.members() == ()
    del name_server


def test_a_list_may_have_names(
    name_server: NameServer,
    hello_server: ServerFactory,
    membership: MembershipFactory,
    expect_log: LogWatch,
) -> None:
    expect_log("the name of peer node.test:[0-9]+ cannot be resolved")
    a, b = hello_server("a"), hello_server("b", "127.0.0.2")
    one = membership(f"{a.address},node.test:{b.port}")
    until(lambda: nodes(one) == [a.identity.node])
    name_server.numbers["node.test"] = ["127.0.0.2", "127.0.0.9"]
    until(lambda: len(nodes(one)) == 2)


def test_members_by_a_real_name(hello_server: ServerFactory, membership: MembershipFactory) -> None:
    a = hello_server("a")
    one = membership(f"dns:localhost:{a.port}")
    until(one.members)
    assert one.members()[0].node == a.identity.node


class Broken:
    """A source with a bug, then one without."""

    every_s: float | None = 0.05

    def __init__(self) -> None:
        self.addresses: tuple[Address, ...] = ()

    def look(self) -> tuple[Address, ...]:
        if not self.addresses:
            raise KeyError("on purpose")
        return self.addresses

    def interrupt(self) -> None:
        return

    def close(self) -> None:
        return


def test_a_source_of_somebody_else_may_fail(
    hello_server: ServerFactory,
    identity: IdentityFactory,
    expect_log: LogWatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "_AFTER_FAILURE_S", 0.1)
    expect_log("the members cannot be looked up")
    a, source = hello_server("a"), Broken()
    one = Heartbeats(identity("me"), source)
    try:
        until(lambda: one.is_settled)
        source.addresses = (Address("127.0.0.1", a.port),)
        until(lambda: nodes(one) == [a.identity.node])
    finally:
        one.close()


def test_static_members_are_who_was_told() -> None:
    a, b = Member("a", "h", 1), Member("b", "h", 2)
    one = StaticMembers([b, a])
    changes: list[tuple[Member, ...]] = []
    one.on_change = lambda: changes.append(one.members())
    assert one.is_settled
    assert one.members() == (a, b)
    one.suspect("a", "slow")
    one.suspect("a", "slow")
    assert changes == [(b,)]
    one.tell([a])
    assert changes == [(b,), (a,)]
    one.close()
