"""Members of a swarm that lie, die, are strangers or have no room cost time, never a byte."""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests.conftest import LogWatch
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import Node
from tests.p2p.swarm.conftest import MIB, SwarmCluster, SwarmFactory, address, cargo_of, swarm_of
from tests.p2p.swarm.handshake import info_hash, shaken

from weightstream import metrics
from weightstream.cachefs.blob import Blob
from weightstream.p2p.exchange.carrier import carry
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.swarm import Swarm
from weightstream.p2p.swarm.cargo import Cargo

_WRONG = 'weightstream_peer_failures_total{cause="wrong"}'


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until_s, f"{what}: not in {timeout_s} s"
        time.sleep(0.01)


def count(sample: str) -> float:
    return metrics.samples().get(sample, 0.0)


def lie(swarm: Swarm, cargo: Cargo, stands_by: bool) -> None:
    """Have a node flip a bit of every piece that it passes on, and take that for right."""
    tell, checker = cargo._keeper.tell, swarm._checkers[cargo.relay.blob.id]

    def flipped(message: dict[str, object], payload: bytes | memoryview = b"") -> bool:
        if message["op"] == "piece":
            changed = bytearray(payload)
            changed[len(changed) // 2] ^= 1
            payload = bytes(changed)
        return tell(message, payload)

    cargo._keeper.tell = flipped  # type: ignore[method-assign]
    checker._check = lambda chunk, expected: cargo.accept(chunk, expected, mended=False)  # type: ignore[method-assign]
    cargo.stands_by = lambda chunk: stands_by  # type: ignore[method-assign]


def made_to_lie(nodes: SwarmCluster, stands_by: bool = False) -> Node:
    """Return the first node, which lies in each swarm that it takes part in."""
    liar = nodes.nodes[0]
    swarm = swarm_of(liar)
    carry = swarm.carry

    def carried(relay: Relay) -> Cargo | None:
        cargo = carry(relay)
        if cargo is not None:
            lie(swarm, cargo, stands_by)
        return cargo

    swarm.carry = carried  # type: ignore[method-assign]
    return liar


def test_wrong_pieces_are_never_seen_and_their_sender_is_left_out(
    swarm: SwarmFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = swarm(2)
    blob, data = nodes.put(s3, 24 * MIB)
    liar, victim = made_to_lie(nodes), nodes.nodes[1]
    before = count(_WRONG)
    expect_log(f"peer {liar.name} sent wrong bytes of .*: left out of the swarm")
    assert nodes.load_all(blob)[1] == data
    wait_until(lambda: address(liar) in swarm_of(victim)._left_out, "left out")
    assert count(_WRONG) - before >= 3
    assert liar.name in victim.exchange._neighbours.alive(), "what it gave elsewhere was right"
    cargo = cargo_of(victim, blob)
    wait_until(lambda: not cargo.ready, "everything was checked")
    for i in cargo._mended:
        extent, got = cargo.relay.chunk(i), memoryview(bytearray(MIB))
        assert cargo.read_into(i, 0, got)
        assert got == data[extent.start : extent.stop], "the file was not mended"
    assert cargo._mended
    assert not any(cargo.stands_by(i) for i in cargo._mended)


def test_who_stands_by_wrong_pieces_is_banned_from_everything(
    swarm: SwarmFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = swarm(2)
    blob, data = nodes.put(s3, 16 * MIB)
    liar, victim = made_to_lie(nodes, stands_by=True), nodes.nodes[1]
    expect_log(f"peer {liar.name} sent wrong bytes of .*: not asked again")
    assert nodes.load_all(blob)[1] == data
    wait_until(lambda: liar.name not in victim.exchange._neighbours.alive(), "banned")
    assert address(liar) in swarm_of(victim)._left_out
    assert victim.name in liar.exchange._neighbours.alive(), "the honest one was banned"


def test_an_honest_node_that_passed_wrong_pieces_on_is_not_banned(
    swarm: SwarmFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = swarm(4)
    blob, data = nodes.put(s3, 16 * MIB)
    liar = made_to_lie(nodes, stands_by=True)
    expect_log.allow("sent wrong bytes of .*: (left out of the swarm|not asked again)")
    assert nodes.load_all(blob)[1:] == [data] * 3
    wait_until(lambda: all_checked(nodes.nodes, blob), "everything was checked")
    for node in nodes.nodes[1:]:
        others = {other.name for other in nodes.nodes if other is not node}
        assert others - {liar.name} <= node.exchange._neighbours.alive().keys()


def all_checked(nodes: list[Node], blob: Blob) -> bool:
    return not any(cargo_of(node, blob).ready for node in nodes)


def begin(nodes: SwarmCluster, blob: Blob) -> tuple[threading.Thread, list[bytes]]:
    """Have everybody load; return when the swarm has brought something to the last one."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.extend(nodes.load_all(blob)))
    thread.start()
    last = nodes.nodes[-1]
    wait_until(lambda: last.exchange._relay(blob).carried is not None, "in the swarm")
    cargo = cargo_of(last, blob)
    wait_until(lambda: bool(cargo._digests) or not thread.is_alive(), "something came")
    return thread, found


def test_a_process_that_is_killed_in_the_middle_is_started_again(
    swarm: SwarmFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    # Nobody writes into a store here: what memory lets go of, its home would read again.
    nodes = swarm(3, memory_budget="256 MiB")
    blob, data = nodes.put(s3, 96 * MIB)
    last = swarm_of(nodes.nodes[-1])
    expect_log(r"the swarm's process ended \(.*SIGKILL\): bulk goes over the exchange")
    thread, found = begin(nodes, blob)
    pid, port = last.pid, last.port
    os.kill(pid, signal.SIGKILL)
    thread.join(60)
    assert found == [data] * 3
    assert nodes.origin_bytes(blob) <= 1.3 * blob.size
    wait_until(lambda: last.port != 0 and last.pid != pid, "started again")
    assert last.port == port, "others know it by its port"


def test_a_process_that_dies_again_and_again_stays_down(
    swarm: SwarmFactory, s3: S3Server, expect_log: LogWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightstream.p2p.swarm.keeper._MOST_DEATHS", 3)
    nodes = swarm(2)
    blob, data = nodes.put(s3, 96 * MIB)
    last = swarm_of(nodes.nodes[-1])
    expect_log(r"the swarm's process ended \(.*SIGKILL\): bulk goes over the exchange")
    expect_log(r"the swarm's process ended 3 times in a row \(.*SIGKILL\): it stays down")
    thread, found = begin(nodes, blob)
    killed: set[int] = set()
    for _ in range(3):
        wait_until(lambda: last.port != 0 and last.pid not in killed, "it runs")
        killed.add(last.pid)
        os.kill(last.pid, signal.SIGKILL)
    thread.join(60)
    assert found == [data] * 2
    wait_until(lambda: not last._keeper._thread.is_alive(), "left down")
    assert last.port == 0
    assert last.pid in killed
    blob, data = nodes.put(s3, 8 * MIB, "another")
    assert nodes.load_all(blob) == [data] * 2
    assert nodes.origin_bytes(blob) <= 1.3 * blob.size


def test_a_member_that_gives_nothing_counts_as_slow(swarm: SwarmFactory, s3: S3Server) -> None:
    nodes = swarm(4)
    blob, data = nodes.put(s3, 24 * MIB)
    silent, others = nodes.nodes[0], nodes.nodes[1:]
    relay = silent.exchange._relay(blob)
    cargo = carry(relay, swarm_of(silent))
    assert isinstance(cargo, Cargo)
    cargo._send = lambda *nothing: None  # type: ignore[method-assign]
    # Sending nothing it reads faster than the others, and would take over from all of them.
    silent.exchange._bulk.take = lambda: False  # type: ignore[method-assign]
    assert nodes.load_all(blob) == [data] * 4
    assert any(silent.name in node.exchange._neighbours.slow() for node in others)
    assert nodes.origin_bytes(blob) <= 1.6 * blob.size


def test_a_disk_without_room_costs_the_swarm_and_not_the_load(
    swarm: SwarmFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = swarm(2)
    blob, data = nodes.put(s3, 24 * MIB)
    most = (4 * MIB, 4 * MIB)
    resource.prlimit(swarm_of(nodes.nodes[0]).pid, resource.RLIMIT_FSIZE, most)
    expect_log("w.bin is not in the swarm any more: File too large")
    assert nodes.load_all(blob) == [data] * 2
    assert nodes.origin_bytes(blob) <= 1.3 * blob.size


def test_a_disk_that_is_nearly_full_is_left_alone(swarm: SwarmFactory, s3: S3Server) -> None:
    nodes = swarm(2)
    blob, data = nodes.put(s3, 8 * MIB)
    first = swarm_of(nodes.nodes[0])
    first._min_free_bytes = 1 << 60
    assert nodes.load_all(blob) == [data] * 2
    assert nodes.nodes[0].exchange._relay(blob).carried is None
    assert nodes.origin_bytes(blob) <= 1.1 * blob.size


def test_a_whole_file_is_given_from_the_store_until_that_lets_go_of_it(
    swarm: SwarmFactory, s3: S3Server
) -> None:
    nodes = swarm(2)
    blob, data = nodes.put(s3, 16 * MIB)
    holder, other = nodes.nodes
    keep(holder, blob, data, range(16))
    assert other.load(blob) == data
    assert nodes.origin_bytes(blob) == 0
    cargo = cargo_of(holder, blob)
    assert cargo.path.is_relative_to(holder.settings.store / "blobs")
    assert cargo.stands_by(3)
    assert any(cargo_of(other, blob).has(i) for i in range(16))
    assert holder.store is not None
    with holder.store.open_blob(blob) as stored:
        stored.drop(3)
    wait_until(lambda: cargo.is_over, "left")
    assert not cargo.stands_by(3)
    assert cargo.path.exists(), "the store's file was removed"


def test_nobody_but_members_is_talked_to(swarm: SwarmFactory, s3: S3Server) -> None:
    nodes = swarm(2)
    blob, data = nodes.put(s3, 8 * MIB)
    assert nodes.load_all(blob) == [data] * 2
    one, other = nodes.nodes
    there = address(one), swarm_of(one).port
    name = info_hash(cargo_of(one, blob)._description)
    assert shaken(there, address(other), name), "a member is answered"
    assert not shaken(there, "127.0.0.99", name), "a stranger was answered"
    assert not shaken(there, address(other), bytes(20)), "answered for a blob that it has not"


def test_a_member_that_is_gone_is_cut_off(
    swarm: SwarmFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightstream.p2p.swarm.addresses._GONE_S", 0.5)
    nodes = swarm(3)
    blob, data = nodes.put(s3, 8 * MIB)
    assert nodes.load_all(blob) == [data] * 3
    one, other = nodes.nodes[:2]
    there = address(one), swarm_of(one).port
    name = info_hash(cargo_of(one, blob)._description)
    del one.told.everybody[other.name]
    wait_until(lambda: not shaken(there, address(other), name), "cut off")
    assert shaken(there, address(nodes.nodes[2]), name)


def test_a_stored_part_is_brought_into_the_swarm(swarm: SwarmFactory, s3: S3Server) -> None:
    nodes = swarm(2)
    blob, data = nodes.put(s3, 16 * MIB)
    first = nodes.nodes[0]
    keep(first, blob, data, range(4))
    assert nodes.load_all(blob) == [data] * 2
    wait_until(lambda: all(cargo_of(first, blob).has(i) for i in range(4)), "in the swarm")
    assert nodes.origin_bytes(blob) <= blob.size - 4 * MIB + MIB


def keep(node: Node, blob: Blob, data: bytes, chunks: range) -> None:
    """Put chunks into a node's store, as a loader does."""
    from blake3 import blake3

    assert node.store is not None
    with node.store.open_blob(blob) as stored:
        for i in chunks:
            extent = stored.chunk(i)
            part = data[extent.start : extent.stop]
            assert stored.try_lock(i)
            try:
                stored.write(i, memoryview(part), blake3(part).digest(), 0)
            finally:
                stored.unlock(i)


def open_files() -> Mapping[str, int]:
    found: dict[str, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
        if "/swarm/" in target:
            found[target] = found.get(target, 0) + 1
    return found


def test_nothing_is_left_when_it_is_closed(
    swarm: SwarmFactory, s3: S3Server, tmp_path: Path
) -> None:
    nodes = swarm(2)
    blob, data = nodes.put(s3, 16 * MIB)
    assert nodes.load_all(blob) == [data] * 2
    swarms = [swarm_of(node) for node in nodes.nodes]
    pids, ports = [one.pid for one in swarms], [one.port for one in swarms]
    own = {one._thread for one in swarms} | {one._keeper._thread for one in swarms}
    pools = [thread for one in swarms for thread in one._pool._threads]
    for node in nodes.nodes:
        node.exchange.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "processes are left"
    assert not any(thread.is_alive() for thread in (*own, *pools)), "threads are left"
    assert not list(tmp_path.glob("store*/swarm/*")), "files are left"
    assert not open_files(), "descriptors are left"
    for node, port in zip(nodes.nodes, ports, strict=True):
        with pytest.raises(ConnectionRefusedError), socket.socket() as sock:
            sock.connect((address(node), port))


def test_what_a_killed_agent_left_is_removed(tmp_path: Path) -> None:
    from weightstream.p2p.swarm.scratch import Scratch

    left = tmp_path / "swarm" / "of-a-dead-one"
    left.mkdir(parents=True)
    (left / "blob.part").write_bytes(b"bytes")
    lives = Scratch(tmp_path)
    assert not left.exists()
    (lives.path / "blob.part").write_bytes(b"bytes")
    other = Scratch(tmp_path)
    assert (lives.path / "blob.part").exists(), "another agent's files were removed"
    other.close()
    lives.close()
    assert not list((tmp_path / "swarm").iterdir())
