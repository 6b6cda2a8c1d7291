"""Agents in a swarm as their users run them: real processes, TLS, kill -9, no libtorrent."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from tests.conftest import SettingsFactory
from tests.kit.agents import Node, make_nodes, wait_acquainted
from tests.kit.models import random_bytes
from tests.kit.processes import run_python
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, client_env

from weightstream.errors import UsageError
from weightstream.p2p.identity import open_identity
from weightstream.p2p.swarm import open_swarm

MIB = 1 << 20
COUNT = 4
ALLOW = ("--allow", "s3://models")


@pytest.fixture
def nodes(proxy: FaultProxy, tmp_path: Path) -> Iterator[list[Node]]:
    """Start four agents, each on an address of its own, whose bulk goes through a swarm."""
    pytest.importorskip("libtorrent")
    made = make_nodes(COUNT, tmp_path, os.environ | client_env(proxy.url), "127.0.0.{}")
    try:
        for node in made:
            host = node.address.rpartition(":")[0]
            node.env |= {
                "WEIGHTSTREAM_PEER_TRANSPORT": "swarm",
                "WEIGHTSTREAM_SWARM_LISTEN": f"{host}:0",
            }
            node.start(*ALLOW)
        wait_acquainted(made)
        yield made
    finally:
        for node in made:
            node.end()


def swarm_processes() -> dict[int, int]:
    """Return the parent of each swarm's process, by its id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):  # `ps` cuts lines where COLUMNS is set
        with suppress(OSError):  # it ended meanwhile
            if b"weightstream.p2p.swarm.process" in (process / "cmdline").read_bytes().split(b"\0"):
                status = (process / "stat").read_text().rpartition(") ")[2].split()
                if status[0] != "Z":
                    found[int(process.name)] = int(status[1])
    return found


def test_agents_load_through_the_swarm_and_one_is_killed_in_the_middle(
    nodes: list[Node], s3: S3Server, proxy: FaultProxy
) -> None:
    data = random_bytes(64 * MIB, "swarmed")
    s3.put_files("models/swarmed", {"model.safetensors": data})
    victim, others = nodes[1], [nodes[0], *nodes[2:]]
    (process,) = [pid for pid, up in swarm_processes().items() if up == victim.agent.pid]
    with ExitStack() as stack:
        running = [stack.enter_context(n.prefetch("s3://models/swarmed")) for n in others]
        dies = stack.enter_context(victim.prefetch("s3://models/swarmed"))
        # Whoever comes first reads from the origin and gives; others get.
        victim.agent.child.wait_for(lambda: passed_bytes(victim) > 0, 60)
        victim.agent.kill()
        dies.kill()
        for child in running:
            outcome = child.result(90)
            assert outcome.returncode == 0, outcome.stderr
    uri = "s3://models/swarmed/model.safetensors"
    assert all(node.data(uri) == data for node in others)
    assert sum(node.peers()["swarm_received"] for node in others) > 0
    assert proxy.body_bytes("model.safetensors") <= 1.5 * len(data)
    until_s = time.monotonic() + 30
    while process in swarm_processes():
        assert time.monotonic() < until_s, "the swarm's process outlived its agent"
        time.sleep(0.05)


def passed_bytes(node: Node) -> int:
    """Return what came to a node and went from it, by whatever way."""
    said = node.peers()
    return sum(said.values()) - said["members"]


def test_an_agent_that_is_asked_to_end_leaves_nothing(nodes: list[Node]) -> None:
    own = {node.agent.pid: pid for pid, up in swarm_processes().items() for node in nodes
           if node.agent.pid == up}  # fmt: skip
    assert len(own) == COUNT
    for node in nodes:
        assert node.agent.terminate() == 0
        assert not list(node.store.glob("swarm/*"))
    assert not own.keys() & set(swarm_processes().values())
    assert not set(own.values()) & swarm_processes().keys()


def test_without_libtorrent_the_setting_is_one_clear_error(
    store_settings: SettingsFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "libtorrent", None)
    settings = store_settings(peer_transport="swarm", peer_encryption="off")
    with pytest.raises(UsageError, match=r"needs the package libtorrent: pip install"):
        open_swarm(settings, open_identity(settings))


def test_chunks_that_make_no_pieces_are_refused(store_settings: SettingsFactory) -> None:
    pytest.importorskip("libtorrent")
    settings = store_settings(peer_transport="swarm", peer_encryption="off", chunk_size=68 << 10)
    with pytest.raises(UsageError, match="multiple of 16 KiB"):
        open_swarm(settings, open_identity(settings))


def test_without_the_setting_nothing_of_it_is_loaded_or_started(
    store_settings: SettingsFactory,
) -> None:
    settings = store_settings(peer_encryption="off")
    assert open_swarm(settings, open_identity(settings)) is None
    code = """
import sys, weightstream.p2p.peering
emit([name for name in sys.modules if name.partition(".")[0] == "libtorrent"])
"""
    assert run_python(code).value == []
