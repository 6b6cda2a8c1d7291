"""Two nodes of the demo: the second has its bytes from the first, and nothing stays behind."""

import os
import socket
from pathlib import Path

import pytest
from tests.kit.models import random_bytes

from weightstream.cachefs.fetch import Progress
from weightstream.demo.nodes import agents, make_nodes
from weightstream.demo.processes import ChildFailed, clean_environment
from weightstream.demo.server import S3Server, serve

pytest.importorskip("cryptography")

SIZE = 20 << 20
URI = "s3://models/w.bin"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bucket" / "models" / "w.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(random_bytes(SIZE, "demo"))
    return path


def quiet(progress: Progress) -> None:
    assert progress.bytes_done <= progress.bytes_total


def environment(server: S3Server) -> dict[str, str]:
    spare = {"WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0"}
    return clean_environment(os.environ) | server.environment() | spare


def test_the_second_node_has_it_from_the_first(file: Path, tmp_path: Path) -> None:
    first, second = nodes = make_nodes(tmp_path, 2)
    with (
        serve(tmp_path / "bucket", tmp_path) as server,
        agents(tmp_path, nodes, environment(server)) as running,
    ):
        running.wait_acquainted()
        one = first.fetch(URI, file, server, quiet)
        two = second.fetch(URI, file, server, quiet)
    assert (one.is_right, two.is_right) == (True, True)
    assert (one.received_bytes, two.received_bytes) == (0, SIZE)
    assert SIZE < one.origin_bytes < 1.1 * SIZE
    assert two.origin_bytes < SIZE // 10
    assert refused(first.address)
    assert refused(second.address)


def test_other_bytes_than_the_bucket_has_are_found(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(reversed(file.read_bytes())))
    (node,) = nodes = make_nodes(tmp_path, 1)
    with (
        serve(tmp_path / "bucket", tmp_path) as server,
        agents(tmp_path, nodes, environment(server)) as running,
    ):
        running.wait_acquainted()
        assert not node.fetch(URI, other, server, quiet).is_right


def test_an_agent_that_cannot_start_is_named_with_what_it_said(tmp_path: Path) -> None:
    nodes = make_nodes(tmp_path, 2)
    host, port = nodes[1].address.split(":")
    with (
        socket.create_server((host, int(port))),
        agents(tmp_path, nodes, clean_environment(os.environ)) as running,
        pytest.raises(ChildFailed, match=rf"{nodes[1].address} met no peer: .*{port}"),
    ):
        running.wait_acquainted()


def refused(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except ConnectionRefusedError:
        return True
    return False
