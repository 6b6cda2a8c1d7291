"""One cluster for this folder: two workers with stores of their own, and models in a real S3."""

from collections.abc import Iterator

import pytest
from examples import shift
from safetensors.torch import save
from tests.kit.ray_cluster import NodeSpec, RayCluster
from tests.kit.s3 import S3Server

MODELS = "s3://models/shift"


@pytest.fixture(scope="module")
def cluster(s3: S3Server) -> Iterator[RayCluster]:
    for key in range(26):
        s3.put(f"models/shift/{key}/model.safetensors", save(shift.weights(key)))
    env = s3.env | {"MODELS": MODELS, "WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0"}
    workers = [NodeSpec(cpus=2, resources={f"node{i}": 1}) for i in (1, 2)]
    with RayCluster(workers, env=env) as running:
        running.start_serve()
        yield running
