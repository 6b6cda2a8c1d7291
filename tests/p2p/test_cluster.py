"""Four agents as their users run them: real processes, mutual TLS, a real S3 server behind."""

import os
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit.agents import Node, make_nodes, wait_acquainted
from tests.kit.models import random_bytes
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, client_env

MIB = 1 << 20
COUNT = 4
ALLOW = ("--allow", "s3://models")


@pytest.fixture
def nodes(s3: S3Server, proxy: FaultProxy, tmp_path: Path) -> Iterator[list[Node]]:
    """Start four agents that know each other by a list of addresses."""
    made = make_nodes(COUNT, tmp_path, os.environ | client_env(proxy.url))
    try:
        for node in made:
            node.start(*ALLOW)
        wait_acquainted(made)
        yield made
    finally:
        for node in made:
            node.end()


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


@pytest.mark.slow
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
        victim.start(*ALLOW)
        wait_acquainted(nodes)


def test_who_has_not_the_secret_is_refused(nodes: list[Node]) -> None:
    port = int(nodes[0].address.rsplit(":", 1)[1])
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
