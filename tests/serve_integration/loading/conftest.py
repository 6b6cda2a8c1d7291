"""One cluster for each module: two workers with stores of their own, and models in a real S3."""

from collections.abc import Iterator

import pytest
from examples import shift
from safetensors.torch import save
from tests.kit.proxy import FaultProxy
from tests.kit.ray_cluster import NodeSpec, RayCluster
from tests.kit.s3 import S3Server, client_env
from tests.serve_integration.nodes.conftest import LastingProxy, end_all

MODELS = "s3://models/shift"


@pytest.fixture(scope="module")
def origin(s3: S3Server) -> Iterator[FaultProxy]:
    """What all nodes of the cluster read through."""
    for key in range(26):
        s3.put(f"models/shift/{key}/model.safetensors", save(shift.weights(key)))
    with LastingProxy(s3.address) as running:
        yield running


@pytest.fixture(scope="module")
def cluster(origin: FaultProxy) -> Iterator[RayCluster]:
    """A head and two workers that replicas can name by a resource: `node1`, `node2`."""
    own = {"MODELS": MODELS, "WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0"}
    workers = [NodeSpec(cpus=2, resources={f"node{i}": 1}) for i in (1, 2)]
    with RayCluster(workers, env=client_env(origin.url) | own) as running:
        running.start_serve()
        try:
            yield running
        finally:
            end_all(running.directory)
