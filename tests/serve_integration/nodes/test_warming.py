"""Weights brought to nodes beforehand: from the origin once, and seen by whoever asks."""

from collections.abc import Iterator

import pytest
from tests.kit.models import random_bytes
from tests.kit.proxy import FaultProxy
from tests.kit.ray_cluster import RayCluster
from tests.kit.s3 import S3Server
from tests.serve_integration.nodes.conftest import SETTINGS

from weightstream.serve_integration import nodes
from weightstream.serve_integration.nodes import holding

pytestmark = pytest.mark.ray

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def agents(cluster: RayCluster) -> Iterator[None]:
    nodes.up(["s3://models"], SETTINGS)
    yield
    nodes.down()


def publish(s3: S3Server, name: str, size: int = 12 * MIB) -> str:
    s3.put_files(f"models/{name}", {"model.safetensors": random_bytes(size, name)})
    return f"s3://models/{name}"


def held(uri: str) -> dict[str, int]:
    holding.forget()
    return nodes.held(uri)


def test_nodes_share_what_the_origin_sends_once(
    cluster: RayCluster, s3: S3Server, origin: FaultProxy
) -> None:
    uri, size = publish(s3, "shared"), 12 * MIB
    first, second = (node.id for node in cluster.workers)
    warming = nodes.warm(uri, [first])
    assert warming.wait(60)
    assert warming.progress()[first].state == "warm", warming.progress()
    assert held(uri) == {cluster.head.id: 0, first: size, second: 0}
    warming = nodes.warm(uri, [second])
    assert warming.wait(60)
    found = warming.progress()[second]
    assert (found.state, found.bytes_done, found.bytes_total) == ("warm", size, size)
    assert held(uri) == {cluster.head.id: 0, first: size, second: size}
    assert origin.body_bytes("shared/model.safetensors") == size
