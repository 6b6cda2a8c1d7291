"""Four agents as their users run them: real processes, mutual TLS, a real S3 server behind."""

import os
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.kit.models import random_bytes
from tests.kit.processes import Child
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, client_env, free_port

from weightstream.cachefs.store import Store
from weightstream.settings import load_settings

MIB = 1 << 20
COUNT = 4


@dataclass
class Node:
    """One node: its agent and what commands on it run with."""

    env: dict[str, str]
    store: Path
    agent: Child

    def prefetch(self, uri: str) -> Child:
        return Child(
            [sys.executable, "-m", "weightstream.cli", "prefetch", uri, "--json"], self.env
        )

    def data(self, uri: str) -> bytes:
        settings = load_settings({"store": self.store})
        with Store.open(settings) as store:
            (info,) = [info for info in store.blobs() if info.blob.uri == uri]
            with store.open_blob(info.blob) as stored:
                assert stored.complete
                return bytes(stored.map()[:])


@pytest.fixture
def nodes(s3: S3Server, proxy: FaultProxy, tmp_path: Path) -> Iterator[list[Node]]:
    """Start four agents that know each other by a list of addresses."""
    secret = tmp_path / "secret"
    secret.write_text("a secret of the whole cluster")
    secret.chmod(0o600)
    ports = [free_port() for _ in range(COUNT)]
    made = []
    for i, port in enumerate(ports):
        env = os.environ | client_env(proxy.url) | {
            "WEIGHTSTREAM_STORE": str(tmp_path / f"store{i}"),
            "WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0",
            "WEIGHTSTREAM_CHUNK_SIZE": "1MiB",
            "WEIGHTSTREAM_RUN_DIRECTORY": str(tmp_path / f"run{i}"),
            "WEIGHTSTREAM_PEERS": ",".join(f"127.0.0.1:{one}" for one in ports),
            "WEIGHTSTREAM_PEER_LISTEN": f"127.0.0.1:{port}",
            "WEIGHTSTREAM_CLUSTER_SECRET_FILE": str(secret),
        }  # fmt: skip
        made.append(Node(env, tmp_path / f"store{i}", start_agent(env)))
    try:
        for node in made:
            wait_ready(node.agent)
        time.sleep(2.5)  # two rounds of hellos
        yield made
    finally:
        for node in made:
            node.agent.__exit__(None, None, None)


def start_agent(env: dict[str, str]) -> Child:
    command = [sys.executable, "-m", "weightstream.cli", "agent", "--allow", "s3://models"]
    return Child(command, env)


def wait_ready(agent: Child) -> None:
    def said() -> str:
        agent._err.seek(0)
        return agent._err.read().decode()

    agent.wait_for(lambda: "is ready in" in said())


def test_four_nodes_prefetch_a_model_that_the_origin_sends_once(
    nodes: list[Node], s3: S3Server, proxy: FaultProxy
) -> None:
    data = random_bytes(24 * MIB, "cluster")
    s3.put_files("models/cluster", {"model.safetensors": data})
    running = [node.prefetch("s3://models/cluster") for node in nodes]
    for child in running:
        with child:
            assert child.result(60).returncode == 0
    uri = "s3://models/cluster/model.safetensors"
    assert all(node.data(uri) == data for node in nodes)
    assert proxy.body_bytes("model.safetensors") <= 1.5 * len(data)


def test_any_one_may_be_killed_in_turn_while_the_others_go_on(
    nodes: list[Node], s3: S3Server, proxy: FaultProxy
) -> None:
    for turn in range(COUNT):
        name = f"turn{turn}"
        data = random_bytes(16 * MIB, name)
        s3.put_files(f"models/{name}", {"model.safetensors": data})
        victim = nodes[turn]
        others = [node for node in nodes if node is not victim]
        running = [node.prefetch(f"s3://models/{name}") for node in others]
        time.sleep(0.3)
        victim.agent.kill()
        for child in running:
            with child:
                outcome = child.result(60)
                assert outcome.returncode == 0, outcome.stderr
        uri = f"s3://models/{name}/model.safetensors"
        assert all(node.data(uri) == data for node in others)
        victim.agent.__exit__(None, None, None)
        victim.agent = start_agent(victim.env)
        wait_ready(victim.agent)


def test_who_has_not_the_secret_is_refused(nodes: list[Node]) -> None:
    port = int(nodes[0].env["WEIGHTSTREAM_PEER_LISTEN"].rsplit(":", 1)[1])
    assert asked_without_secret(port, tls=False) == b""
    assert asked_without_secret(port, tls=True) == b""


def asked_without_secret(port: int, tls: bool) -> bytes:
    """Return what a stranger hears."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        try:
            with context.wrap_socket(sock) if tls else sock as talking:
                talking.sendall(b"GET /v1/hello HTTP/1.1\r\n\r\n")
                return talking.recv(100)
        except OSError:  # TLS 1.3 learns of the refusal when it reads
            return b""
