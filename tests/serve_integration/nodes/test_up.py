"""Agents on a real cluster: they come, stay, are replaced, and go."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tests.kit.processes import Child
from tests.kit.proxy import FaultProxy
from tests.kit.ray_cluster import NodeSpec, RayCluster, RunningNode
from tests.kit.s3 import client_env, free_port
from tests.serve_integration.nodes.conftest import (
    SETTINGS,
    daemon,
    daemons,
    eventually,
    is_alive,
    kill,
)

from weightstream.errors import UsageError
from weightstream.serve_integration import nodes, registry
from weightstream.serve_integration.nodes.cluster import tracker
from weightstream.serve_integration.nodes.fleet import node_states
from weightstream.serve_integration.nodes.orders import noted_orders
from weightstream.serve_integration.nodes.talking import status_of

pytestmark = pytest.mark.ray

ALLOW = ["s3://models"]


@pytest.fixture(scope="module", autouse=True)
def _down_in_the_end(cluster: RayCluster) -> Iterator[None]:
    yield
    nodes.down()


def up() -> dict[str, str]:
    """Bring agents up; return what was done by node."""
    reports = nodes.up(ALLOW, SETTINGS)
    assert [one.error for one in reports if one.way == "failed"] == []
    return {one.node_id: one.way for one in reports}


def members(node_id: str) -> int:
    return len(status_of(registry.agents()[node_id])["peers"]["members"])


def test_up_is_idempotent_and_down_leaves_nothing(cluster: RayCluster) -> None:
    ids = [node.id for node in cluster.nodes]
    assert up() == dict.fromkeys(ids, "started")
    first = registry.agents()
    assert up() == dict.fromkeys(ids, "kept")
    assert registry.agents() == first
    for node_id in ids:
        eventually(lambda node_id=node_id: members(node_id) == 3)  # type: ignore[misc]
    assert {one.way for one in nodes.down()} == {"stopped"}
    assert registry.agents() == {}
    assert noted_orders() is None
    assert daemons(cluster.directory) == []
    assert not list(cluster.directory.glob("*/run/serve/secret"))
    assert {one.way for one in nodes.down()} == {"none"}
    assert nodes.ensure(ids) == ()  # nobody wants agents any more


def test_an_agent_leaves_its_node_idle_and_outlives_the_worker(cluster: RayCluster) -> None:
    up()
    node = cluster.workers[0]
    running = daemon(node).running()
    assert running is not None
    eventually(lambda: node_states()[node.id].status == "IDLE")
    workers = workers_of(node)
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, workers)))
    eventually(lambda: node_states()[node.id].status == "IDLE")
    assert daemon(node).running() == running
    assert status_of(registry.agents()[node.id])["waits_for"] == []


def workers_of(node: RunningNode) -> list[int]:
    """Return the processes of the raylet that run tasks."""
    (raylet,) = node.handle.all_processes["raylet"]
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            line = (entry / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        is_worker = line.startswith(b"ray::") and b"Agent" not in line  # a raylet dies with those
        if parent == str(raylet.process.pid) and is_worker:
            found.append(int(entry.name))
    return found


def test_secrets_stand_in_private_files_only(cluster: RayCluster) -> None:
    up()
    orders, agents = noted_orders(), registry.agents()
    assert orders is not None
    hidden = [orders.secret, *(agent.token for agent in agents.values())]
    assert all(len(one) >= 32 for one in hidden)
    assert not any(one in repr(orders) + repr(agents) for one in hidden)
    for node in cluster.nodes:
        for name in ("agent", "tracker") if node is cluster.head else ("agent",):
            running = daemon(node, name).running()
            assert running is not None
            proc = Path(f"/proc/{running.pid}")
            seen = (proc / "cmdline").read_text() + (proc / "environ").read_text()
            seen += daemon(node, name).log.read_text()
            assert not any(one in seen for one in hidden)
        files = list((node.home / "run" / "serve").iterdir())
        assert {"token", "secret", "agent.pid"} <= {one.name for one in files}
        assert all(one.stat().st_mode & 0o077 == 0 for one in files if one.suffix != ".pid")


def test_one_that_was_killed_is_started_by_the_next_up(cluster: RayCluster) -> None:
    up()
    node = cluster.workers[0]
    kill(node)
    ways = up()
    assert ways.pop(node.id) == "started"
    assert set(ways.values()) == {"kept"}


def test_one_that_hangs_is_replaced(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    up()
    node = cluster.workers[0]
    running = daemon(node).running()
    assert running is not None
    os.kill(running.pid, signal.SIGSTOP)
    ways = up()
    assert ways.pop(node.id) == "restarted"
    assert set(ways.values()) == {"kept"}
    assert not is_alive(running.pid)


def test_other_settings_restart_all(cluster: RayCluster) -> None:
    up()
    reports = nodes.up(ALLOW, SETTINGS | {"peer_window": "32MiB"})
    assert {one.way for one in reports} == {"restarted"}
    assert set(up().values()) == {"restarted"}


def test_when_the_tracker_dies_agents_go_on_and_up_starts_it_again(cluster: RayCluster) -> None:
    up()
    before = tracker()
    eventually(lambda: members(cluster.head.id) == 3)
    kill(cluster.head, "tracker")
    assert status_of(registry.agents()[cluster.head.id])["waits_for"] == []
    assert members(cluster.head.id) == 3
    assert set(up().values()) == {"kept"}
    assert tracker() == before
    assert daemon(cluster.head, "tracker").running() is not None


def test_a_node_that_joins_is_brought_up(cluster: RayCluster) -> None:
    up()
    stop = threading.Event()
    told: list[Sequence[nodes.NodeReport]] = []
    watching = threading.Thread(
        target=lambda: nodes.watch(stop, told.append, every_s=0.2), name="pytest-watch"
    )
    watching.start()
    late = cluster.add_node(NodeSpec(cpus=1))
    try:
        eventually(lambda: told)
        assert [(one.node_id, one.way) for one in told[0]] == [(late.id, "started")]
        eventually(lambda: members(late.id) == 4)
        stop.set()
        watching.join(60)
        assert not watching.is_alive()
        daemon(late).stop()
        registry.forget_agent(late.id)
        assert [one.way for one in nodes.ensure([late.id, "gone"])] == ["started"]
        assert nodes.ensure([late.id]) == ()
    finally:
        stop.set()
        watching.join(60)
        daemon(late).stop()
        cluster.kill_node(late)
    eventually(lambda: late.id not in node_states())
    up()
    assert late.id not in registry.agents()


def test_a_port_that_is_taken_is_said_and_down_clears_the_half_that_came_up(
    cluster: RayCluster,
) -> None:
    nodes.down()
    port = free_port()  # all nodes are on this machine: only one can have it
    reports = nodes.up(ALLOW, SETTINGS | {"peer_listen": f"127.0.0.1:{port}"})
    ways = sorted(one.way for one in reports)
    assert ways == ["failed", "failed", "started"]
    for one in reports:
        if one.way == "failed":
            assert str(port) in one.error
            assert "\n" not in one.error
            assert one.agent is None
    assert len(registry.agents()) == 1
    nodes.down()
    assert daemons(cluster.directory) == []


def test_settings_that_cannot_be_are_refused_before_anything_is_done(cluster: RayCluster) -> None:
    nodes.down()
    with pytest.raises(UsageError, match="chunk_sice"):
        nodes.up(ALLOW, {"chunk_sice": "1MiB"})
    assert noted_orders() is None
    assert daemons(cluster.directory) == []


def test_an_agent_of_systemd_is_found_and_left_alone(
    cluster: RayCluster, origin: FaultProxy, tmp_path: Path
) -> None:
    nodes.down()
    node = cluster.workers[0]
    token = tmp_path / "token"
    token.write_text("a-token-of-its-own-for-systemd")
    environment = client_env(origin.url) | {
        "WEIGHTSTREAM_STORE": str(node.home / "store"),
        "WEIGHTSTREAM_RUN_DIRECTORY": str(node.home / "run"),
    }
    line = [sys.executable, "-m", "weightstream.cli", "agent"]
    api = ["--api", "0.0.0.0:0", "--api-token-file", str(token)]
    with Child([*line, *api], environment) as agent:
        agent.wait_for((node.home / "run" / "agent-control.sock").exists)
        assert up()[node.id] == "found"
        found = registry.agents()[node.id]
        assert found.pid == 0
        assert found.token == "a-token-of-its-own-for-systemd"
        assert "version" in status_of(found)
        assert not found.api.startswith("0.0.0.0")
        ways = {one.node_id: one.way for one in nodes.down()}
        assert ways.pop(node.id) == "none"
        assert set(ways.values()) == {"stopped"}
        assert agent.process.poll() is None
        os.kill(agent.pid, signal.SIGTERM)
        assert agent.result(20).returncode == 0
    with Child(line, environment) as agent:  # no API over TCP
        agent.wait_for((node.home / "run" / "agent-control.sock").exists)
        assert up()[node.id] == "found"
        assert registry.agents()[node.id].api == ""
        warming = nodes.warm("s3://models/any", [node.id])
        assert warming.wait(60)
        assert warming.progress()[node.id].state == "skipped"
        assert "--api" in warming.progress()[node.id].reason
