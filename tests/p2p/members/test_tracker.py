"""Members that find each other by a tracker, and BitTorrent clients that do."""

import http.client
import json
import random
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import LogWatch
from tests.kit.processes import run_python
from tests.p2p.identity.conftest import OTHER_SECRET
from tests.p2p.members.conftest import (
    IdentityFactory,
    MembershipFactory,
    RudeFactory,
    ServerFactory,
    nodes,
    until,
)

from weightstream.errors import UsageError
from weightstream.p2p.identity import ClusterKeys, Identity
from weightstream.p2p.members import tracked
from weightstream.p2p.members import tracker as module
from weightstream.p2p.members.registry import TTL_S, Entry, Registry
from weightstream.p2p.members.swarms import Bencoded, bencode
from weightstream.p2p.members.tracker import Tracker, announce_key, announce_url

PLAIN = {"peer_encryption": "off"}
TrackerFactory = Callable[..., Tracker]


@pytest.fixture
def tracker() -> Iterator[TrackerFactory]:
    """Start a tracker of these keys."""
    made: list[Tracker] = []

    def make(keys: ClusterKeys | None = None, port: int = 0) -> Tracker:
        made.append(Tracker("127.0.0.1", port, keys))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(
    tracker: Tracker,
    method: str,
    path: str,
    body: bytes | None = None,
    who: Identity | None = None,
    header: str | None = None,
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", tracker.port, timeout=10)
    if who is not None and who.signer is not None:
        header = who.signer.sign(method, path)
    try:
        connection.request(method, path, body, {"Authorization": header} if header else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def entry(**changes: Any) -> bytes:
    return json.dumps(
        {"node": "n-1", "host": "10.0.0.1", "port": 7470, "zone": "z"} | changes
    ).encode()


def test_members_find_each_other(
    tracker: TrackerFactory,
    hello_server: ServerFactory,
    membership: MembershipFactory,
) -> None:
    a, b, c = hello_server("a"), hello_server("b"), hello_server("c")
    running = tracker(a.identity.keys)
    peers = f"tracker:http://127.0.0.1:{running.port}"
    of_a = membership(peers, a.identity, a.port)
    until(lambda: of_a.is_settled)
    assert of_a.members() == ()
    of_b = membership(peers, b.identity, b.port)
    until(lambda: nodes(of_b) == [a.identity.node])
    until(lambda: nodes(of_a) == [b.identity.node], 2)  # by long poll, before the next registration
    elsewhere = {"peer_address": f"127.0.0.1:{c.port}"}
    membership(peers, c.identity, 1, **elsewhere)
    until(lambda: len(nodes(of_a)) == len(nodes(of_b)) == 2)
    assert {m.port for m in of_a.members()} == {b.port, c.port}


def test_a_restarted_tracker_is_told_again(
    tracker: TrackerFactory,
    hello_server: ServerFactory,
    membership: MembershipFactory,
    expect_log: LogWatch,
) -> None:
    expect_log(
        "the tracker 127.0.0.1:[0-9]+ does not answer: .*; the members known before are kept"
    )
    a, b, c = hello_server("a"), hello_server("b"), hello_server("c")
    first = tracker(a.identity.keys)
    peers = f"tracker:http://127.0.0.1:{first.port}"
    of_a, of_b = membership(peers, a.identity, a.port), membership(peers, b.identity, b.port)
    until(lambda: nodes(of_a) and nodes(of_b))
    first.close()
    until(lambda: len(expect_log.messages("does not answer")) == 2)
    assert nodes(of_a) == [b.identity.node]
    tracker(a.identity.keys, first.port)
    of_c = membership(peers, c.identity, c.port)
    until(lambda: len(nodes(of_c)) == 2 and len(nodes(of_a)) == 2 and len(nodes(of_b)) == 2)


def test_a_tracker_that_is_not_there_settles(
    membership: MembershipFactory, expect_log: LogWatch
) -> None:
    expect_log("the tracker 127.0.0.1:1 does not answer: Connection refused")
    one = membership("tracker:http://127.0.0.1:1")
    until(lambda: one.is_settled)


def test_a_node_of_another_secret_is_not_told(
    tracker: TrackerFactory,
    identity: IdentityFactory,
    membership: MembershipFactory,
    expect_log: LogWatch,
) -> None:
    expect_log("the tracker .* answered 401 its signature is wrong")
    running = tracker(identity("a").keys)
    one = membership(
        f"tracker:http://127.0.0.1:{running.port}", identity("b", OTHER_SECRET, **PLAIN)
    )
    until(lambda: one.is_settled)
    status, listed = ask(running, "GET", "/v1/members", who=identity("a"))
    assert (status, json.loads(listed)["members"]) == (200, [])


def silent(sock: socket.socket) -> None:
    sock.recv(1 << 16)
    sock.recv(1 << 16)


def says(body: bytes) -> Callable[[socket.socket], object]:
    def talk(sock: socket.socket) -> None:
        while sock.recv(1 << 16):
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    return talk


@pytest.mark.parametrize(
    "rude",
    [
        silent,
        says(b""),
        says(b"[]"),
        says(b'{"epoch": 1}'),
        says(b'{"epoch": "x", "members": []}'),
        says(b'{"epoch": 1, "members": [7]}'),
        says(b"[" * 60_000),
        says(b"x" * (5 << 20)),
    ],
)
def test_a_tracker_that_talks_nonsense_is_reported(
    rude: Callable[[socket.socket], object],
    rude_server: RudeFactory,
    membership: MembershipFactory,
    expect_log: LogWatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracked, "_ANSWER_S", 0.5)
    expect_log("the tracker .* (answered|does not answer)")
    one = membership(f"tracker:http://127.0.0.1:{rude_server(rude).port}")
    until(lambda: one.is_settled)
    assert one.members() == ()


def test_a_tracker_behind_https_has_to_show_a_certificate(
    rude_server: RudeFactory,
    hello_server: ServerFactory,
    membership: MembershipFactory,
    identity: IdentityFactory,
    expect_log: LogWatch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = hello_server("a")
    made = a.identity.credentials("localhost")
    (tmp_path / "tracker.pem").write_bytes(made.certificate + made.private_key)
    (tmp_path / "ca.pem").write_bytes(made.authority)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "tracker.pem")
    listed = [{"host": "127.0.0.1", "port": a.port}]
    talk = says(json.dumps({"epoch": 1, "members": listed}).encode())

    def secure(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as wrapped:
            talk(wrapped)

    peers = f"tracker:https://localhost:{rude_server(secure).port}"
    expect_log("the tracker localhost:[0-9]+ does not answer: .*CERTIFICATE_VERIFY_FAILED")
    one = membership(peers)
    until(lambda: one.is_settled)
    assert one.members() == ()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    other = membership(peers)
    until(lambda: nodes(other) == [a.identity.node])


def test_impossible_entries_of_a_tracker_are_left_out(
    rude_server: RudeFactory, hello_server: ServerFactory, membership: MembershipFactory
) -> None:
    a = hello_server("a")
    listed = [
        {"host": "127.0.0.1", "port": 1 << 20},
        {"host": "a b", "port": 1},
        {"host": None, "port": 1},
        {"host": "127.0.0.1", "port": True},
        {"host": "127.0.0.1", "port": a.port},
    ]
    body = json.dumps({"epoch": 1, "members": listed}).encode()
    one = membership(f"tracker:http://127.0.0.1:{rude_server(says(body)).port}")
    until(lambda: nodes(one) == [a.identity.node])


def test_a_long_poll_waits_for_a_change(tracker: TrackerFactory) -> None:
    running = tracker()
    status, listed = ask(running, "POST", "/v1/members", entry())
    assert status == 200
    first = json.loads(listed)
    assert first["members"] == [json.loads(entry())]
    assert json.loads(ask(running, "POST", "/v1/members", entry())[1])["epoch"] == first["epoch"]
    path = f"/v1/members?wait={first['epoch']}&seconds="
    begun_s = time.monotonic()
    assert json.loads(ask(running, "GET", path + "0.3")[1]) == first
    assert time.monotonic() - begun_s > 0.25
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=15)
    connection.request("GET", path + "15")
    ask(running, "POST", "/v1/members", entry(node="n-2"))
    news = json.loads(connection.getresponse().read())
    connection.close()
    assert [m["node"] for m in news["members"]] == ["n-1", "n-2"]
    assert news["epoch"] != first["epoch"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[" * 10_000,
        b"[]",
        entry(node="a b"),
        entry(node=7),
        entry(host="a/b"),
        entry(host=None),
        entry(port=0),
        entry(port="7470"),
        entry(port=True),
        entry(zone="z" * 500),
        entry(zone=["z"]),
    ],
)
def test_nonsense_is_refused(body: bytes, tracker: TrackerFactory) -> None:
    running = tracker()
    assert ask(running, "POST", "/v1/members", body)[0] == 400
    assert json.loads(ask(running, "GET", "/v1/members")[1])["members"] == []


def test_an_oversize_body_is_refused(tracker: TrackerFactory) -> None:
    assert ask(tracker(), "POST", "/v1/members", b"x" * 20_000)[0] == 413


def test_other_paths_are_none(tracker: TrackerFactory) -> None:
    running = tracker()
    assert ask(running, "GET", "/")[0] == 404
    assert ask(running, "DELETE", "/v1/members")[0] == 405
    assert ask(running, "GET", "/v1/members?wait=soon")[0] == 400


def test_garbage_and_slow_clients_keep_nobody_from_it(
    tracker: TrackerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IDLE_S", 0.5)
    monkeypatch.setattr(module, "_BODY_S", 0.5)
    running = tracker()
    noise = random.Random(3)
    beginnings = [
        b"",
        b"GET /v1/mem",
        b"POST /v1/members HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\n{",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000,
        b"\x16\x03\x01\x02\x00\x01\x00",
        *(noise.randbytes(400) for _ in range(20)),
    ]
    socks = [socket.create_connection(("127.0.0.1", running.port), 5) for _ in beginnings]
    for sock, data in zip(socks, beginnings, strict=True):
        sock.sendall(data)
    assert ask(running, "POST", "/v1/members", entry())[0] == 200
    for sock in socks:
        sock.settimeout(8)
        try:
            while sock.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        sock.close()
    assert ask(running, "GET", "/v1/members")[0] == 200


def test_only_so_many_connections_are_served(
    tracker: TrackerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_CONNECTIONS", 5)
    running = tracker()
    socks = [socket.create_connection(("127.0.0.1", running.port), 5) for _ in range(5)]
    until(lambda: not _answers(running))
    for sock in socks:
        sock.close()
    until(lambda: _answers(running))


def _answers(running: Tracker) -> bool:
    try:
        return ask(running, "GET", "/v1/members")[0] == 200
    except OSError:
        return False


def test_only_the_secret_opens_it(tracker: TrackerFactory, identity: IdentityFactory) -> None:
    member, stranger = identity("a"), identity("b", OTHER_SECRET)
    running = tracker(member.keys)
    assert ask(running, "POST", "/v1/members", entry(), who=member)[0] == 200
    assert ask(running, "POST", "/v1/members", entry(), who=stranger)[0] == 401
    assert ask(running, "POST", "/v1/members", entry())[0] == 401
    assert ask(running, "GET", "/v1/members")[0] == 401
    assert member.signer is not None
    header = member.signer.sign("GET", "/v1/members")
    assert ask(running, "GET", "/v1/members", header=header)[0] == 200
    assert ask(running, "GET", "/v1/members", header=header)[0] == 401
    header = member.signer.sign("GET", "/v1/members")
    assert ask(running, "GET", "/v1/members?wait=1", header=header)[0] == 401


def test_a_port_in_use_is_reported(tracker: TrackerFactory) -> None:
    running = tracker()
    with pytest.raises(UsageError, match=f"cannot listen at 127.0.0.1:{running.port}"):
        tracker(port=running.port)


# The registry, with a clock that is a number


def test_registrations_expire() -> None:
    registry = Registry(5)
    one, two = Entry("a", "h", 1, ""), Entry("b", "h", 2, "")
    assert registry.register(one, 0)
    assert registry.register(two, 10)
    assert not registry.register(one, 11)
    assert registry.epoch == 7
    assert not registry.expire(10 + TTL_S - 0.1)
    assert registry.expire(10 + TTL_S)
    assert registry.entries() == (one,)
    assert registry.epoch == 8


def test_the_registry_is_bounded() -> None:
    registry = Registry(0, most=3)
    for i in range(10):
        registry.register(Entry(f"n{i}", "h", 1, ""), i)
    assert [e.node for e in registry.entries()] == ["n7", "n8", "n9"]


# BitTorrent

HASH = bytes(range(236, 256))


def announce(running: Tracker, peer: int, **fields: Any) -> Any:
    query: dict[str, Any] = {
        "info_hash": HASH,
        "peer_id": b"-LT2110-%012d" % peer,
        "port": 6881 + peer,
        "left": 5,
        "compact": 1,
        "event": "started",
    }
    text = urllib.parse.urlencode(query | fields)
    status, body = ask(running, "GET", f"/announce?{text}")
    assert status == 200
    return bdecode(body)


def bdecode(data: bytes) -> Any:
    value, rest = _bdecode(data)
    assert rest == b""
    return value


def _bdecode(data: bytes) -> tuple[Any, bytes]:
    if data[:1] == b"i":
        number, _, rest = data[1:].partition(b"e")
        return int(number), rest
    if data[:1] in (b"l", b"d"):
        items, rest = [], data[1:]
        while rest[:1] != b"e":
            item, rest = _bdecode(rest)
            items.append(item)
        made = items if data[:1] == b"l" else dict(zip(items[::2], items[1::2], strict=True))
        return made, rest[1:]
    length, _, rest = data.partition(b":")
    return rest[: int(length)], rest[int(length) :]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-3, b"i-3e"),
        (b"spam", b"4:spam"),
        ([b"a", 1], b"l1:ai1ee"),
        ({b"b": 1, b"a": {b"": []}}, b"d1:ad0:lee1:bi1ee"),
    ],
)
def test_bencode(value: Bencoded, text: bytes) -> None:
    assert bencode(value) == text
    assert bdecode(text) == value


def test_peers_are_told_of_each_other(tracker: TrackerFactory) -> None:
    running = tracker()
    assert announce(running, 1) == {
        b"complete": 0,
        b"incomplete": 1,
        b"interval": 60,
        b"peers": b"",
    }
    answer = announce(running, 2, left=0)
    assert answer[b"peers"] == bytes([127, 0, 0, 1]) + (6882).to_bytes(2, "big")
    assert (answer[b"complete"], answer[b"incomplete"]) == (1, 1)
    assert announce(running, 3, left=0)[b"peers"] == answer[b"peers"]  # no seed for a seed
    assert len(announce(running, 1)[b"peers"]) == 12
    assert len(announce(running, 1, numwant=1)[b"peers"]) == 6
    assert announce(running, 1, numwant=0)[b"peers"] == b""
    (listed,) = announce(running, 3, left=0, compact=0)[b"peers"]
    assert listed == {b"peer id": b"-LT2110-000000000001", b"ip": b"127.0.0.1", b"port": 6882}
    assert announce(running, 1, event="stopped")[b"incomplete"] == 0
    assert announce(running, 4, info_hash=bytes(20))[b"peers"] == b""
    scraped = bdecode(ask(running, "GET", f"/scrape?info_hash={urllib.parse.quote(HASH)}")[1])
    assert scraped == {b"files": {HASH: {b"complete": 2, b"downloaded": 0, b"incomplete": 0}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"info_hash": b"short"},
        {"peer_id": b"short"},
        {"port": 0},
        {"port": 65536},
        {"port": "x"},
        {"port": "-1"},
        {"left": "many"},
        {"numwant": "9" * 30},
    ],
)
def test_a_bad_announce_is_refused(fields: dict[str, Any], tracker: TrackerFactory) -> None:
    running = tracker()
    assert list(announce(running, 1, **fields)) == [b"failure reason"]
    assert announce(running, 2)[b"incomplete"] == 1


def test_announces_need_the_key(tracker: TrackerFactory, identity: IdentityFactory) -> None:
    member = identity("a")
    key = announce_key(member.keys)
    running = tracker(member.keys)
    assert key == member.key("tracker").hex()
    for wrong in ({}, {"key": "0" * 64}, {"key": announce_key(identity("b", OTHER_SECRET).keys)}):
        assert announce(running, 1, **wrong) == {b"failure reason": b"the key is wrong"}
    assert announce(running, 1, key=key, ip="10.1.2.3")[b"incomplete"] == 1
    query = urllib.parse.urlencode(
        [("key", key), ("info_hash", HASH), ("peer_id", b"-LT2110-000000000002"), ("port", 1),
         ("ip", "2001:db8::1"), ("key", "4FB2A1C0")]
    )  # fmt: skip
    answer = bdecode(ask(running, "GET", f"/announce?{query}")[1])
    assert answer[b"peers"] == bytes([10, 1, 2, 3]) + (6882).to_bytes(2, "big")
    again = announce(running, 1, key=key)
    assert again[b"peers6"][:4] == bytes([0x20, 0x01, 0x0D, 0xB8])
    assert bdecode(ask(running, "GET", "/scrape")[1])[b"failure reason"] == b"the key is wrong"
    for path, fine in (
        (f"/scrape/{key}", True),
        (f"/scrape/{key[:-1]}", False),
        ("/scrape/%FF", False),
    ):
        answer = bdecode(ask(running, "GET", f"{path}?info_hash={urllib.parse.quote(HASH)}")[1])
        assert (b"files" in answer) is fine


def test_urls_for_torrents(identity: IdentityFactory) -> None:
    keys = identity("a").keys
    assert announce_url("http://t:7472/", None) == "http://t:7472/announce"
    assert announce_url("http://t:7472", keys) == f"http://t:7472/announce/{announce_key(keys)}"


def test_without_a_secret_a_peer_is_where_it_asks_from(tracker: TrackerFactory) -> None:
    running = tracker()
    announce(running, 1, ip="192.0.2.1")
    assert announce(running, 2)[b"peers"][:4] == bytes([127, 0, 0, 1])


SWARM = """
import time
import libtorrent as lt

where, url = sys.argv[1:]
data = bytes(range(256)) * 1024

def session():
    params = lt.session_params()
    params.settings = {
        "listen_interfaces": "127.0.0.1:0", "enable_dht": False, "enable_lsd": False,
        "enable_upnp": False, "enable_natpmp": False, "stop_tracker_timeout": 1,
        "allow_multiple_connections_per_ip": True, "min_announce_interval": 1,
    }
    return lt.session(params)

with open(where + "/w.bin", "wb") as file:
    file.write(data)
made = lt.create_torrent([lt.create_file_entry("w.bin", len(data))], 65536, 0)
lt.set_piece_hashes(made, where)
made.set_priv(True)
made.add_tracker(url)
torrent = lt.bencode(made.generate())
sessions = []
for folder in (where, where + "/other"):
    parameters = lt.load_torrent_buffer(torrent)
    parameters.save_path = folder
    one = session()
    sessions.append((one, one.add_torrent(parameters)))
    time.sleep(0.5)
deadline = time.monotonic() + 30
last = sessions[1][1]
while not last.status().is_seeding and time.monotonic() < deadline:
    time.sleep(0.1)
    last.force_reannounce()
emit(last.status().is_seeding)
"""


def test_libtorrent_finds_its_peers_here(
    tracker: TrackerFactory, identity: IdentityFactory, tmp_path: Path
) -> None:
    pytest.importorskip("libtorrent")
    keys = identity("a").keys
    running = tracker(keys)
    (tmp_path / "other").mkdir()
    url = announce_url(f"http://127.0.0.1:{running.port}", keys)
    outcome = run_python(SWARM, tmp_path, url)
    assert outcome.value is True
    assert (tmp_path / "other" / "w.bin").read_bytes() == (tmp_path / "w.bin").read_bytes()
