"""`weightstream serve status`, `warm` and `timeline` before a real cluster with the plug-in."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from tests.kit.processes import Outcome, run_cli
from tests.kit.proxy import FaultProxy
from tests.kit.ray_cluster import NodeSpec, RayCluster, wait_until
from tests.kit.s3 import client_env
from tests.serve_integration.loading.conftest import MODELS
from tests.serve_integration.nodes.conftest import SETTINGS, end_all, kill

from weightstream.serve_integration import nodes, registry
from weightstream.serve_integration.compaction.ledger import read_state

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

URI = f"{MODELS}/1"
PLAIN = registry.Deployment("plain", "Plain")
_PLUGIN = {
    "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": (
        "weightstream.serve_integration.compaction.plugin.install"
    ),
    "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1",
}


@pytest.fixture(scope="module")
def cluster(origin: FaultProxy) -> Iterator[RayCluster]:
    """With the compactor's plug-in in Serve's controller, and agents on its nodes."""
    own = {"MODELS": MODELS, "WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0"}
    env = client_env(origin.url) | own | _PLUGIN
    with RayCluster([NodeSpec(cpus=1), NodeSpec(cpus=1)], env=env) as running:
        running.start_serve()
        try:
            nodes.up(["s3://models"], SETTINGS)
            yield running
        finally:
            nodes.down()
            end_all(running.directory)


@pytest.fixture(scope="module", autouse=True)
def app(cluster: RayCluster) -> None:
    serve.run(import_module("examples.plain").app, name="plain", route_prefix="/plain")
    wait_until(lambda: registry.starts_of(PLAIN), "its start is noted")


def command(cluster: RayCluster, *words: str) -> Outcome:
    env = {"RAY_AUTH_MODE": "disabled", "COLUMNS": "240"}
    outcome = run_cli("serve", *words, "--address", cluster.address, env=env)
    assert outcome.returncode == 0, outcome.stderr
    return outcome


def document(cluster: RayCluster, *words: str) -> Any:
    return json.loads(command(cluster, *words, "--json").stdout)


def by_id(status: Any) -> dict[str, Any]:
    return {node["node_id"]: node for node in status["nodes"]}


def test_status_says_who_holds_what_and_what_the_compactor_thinks(cluster: RayCluster) -> None:
    (replica,) = cluster.running("plain")
    (other,) = {node.id for node in cluster.workers} - {replica.node_id}
    found = document(cluster, "status")
    assert list(found["models"]) == [URI]
    size = found["models"][URI]
    here, there = by_id(found)[replica.node_id], by_id(found)[other]
    assert here["replicas"] == {"plain/Plain": 1}
    assert there["replicas"] == {}
    assert [one["held_bytes"] for one in here["held"]] == [size]
    assert [one["held_bytes"] for one in there["held"]] == [0]
    assert here["agent"]["state"] == "ready"
    assert here["agent"]["is_ours"]
    assert by_id(found)[cluster.head.id]["is_head"]

    warmed = document(cluster, "warm", "plain/Plain", "--node", other[:12])
    assert [(row["node_id"], row["state"]) for row in warmed] == [(other, "warm")]
    there = by_id(document(cluster, "status"))[other]
    assert [one["held_bytes"] for one in there["held"]] == [size]


def test_status_is_a_table(cluster: RayCluster) -> None:
    wait_until(read_state, "the plug-in has said something")
    text = command(cluster, "status").stdout
    (replica,) = cluster.running("plain")
    header, *lines = text.splitlines()
    titles = ["NODE", "HOST", "RAY", "REPLICAS", "AGENT", "HELD", "COMPACTOR"]
    assert header.split() == titles
    (line,) = [one for one in lines if one.startswith(replica.node_id[:12])]
    assert "1 plain/Plain" in line
    assert "ready" in line
    state = read_state()
    assert state is not None
    said = document(cluster, "status")["compaction"]
    assert said["phase"] in ("waiting", "looking", "blocked")
    assert f"compaction: {said['phase']}" in text
    assert any(one.startswith("tracker: http://") for one in lines)


def test_an_agent_that_died_is_said(cluster: RayCluster) -> None:
    kill(cluster.head)
    found = by_id(document(cluster, "status"))[cluster.head.id]["agent"]
    assert found["state"] == "silent"
    assert found["detail"]
    assert "silent" in command(cluster, "status").stdout


def test_the_timeline_shows_the_start(cluster: RayCluster, tmp_path: Path) -> None:
    (replica,) = cluster.running("plain")
    picture = tmp_path / "starts.svg"
    text = command(cluster, "timeline", "--plot", str(picture)).stdout
    header, line = text.splitlines()
    assert header.split()[-7:] == [
        "PROCESS", "IMPORT", "HEADER", "FIRST-BYTE", "LAST-BYTE", "TO-DEVICE", "READY",
    ]  # fmt: skip
    assert line.startswith("plain#Plain")
    assert URI in line
    assert "1" in picture.read_text(encoding="utf-8")
    (found,) = document(cluster, "timeline", "--app", "plain")
    assert found["replica"] == replica.id
    assert [load["uri"] for load in found["loads"]] == [URI]
    assert document(cluster, "timeline", "--app", "none") == []
