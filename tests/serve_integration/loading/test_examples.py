"""Every example runs on a cluster and answers right, and what its start took is recorded."""

import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
from ray import serve
from tests.kit.ray_cluster import RayCluster, wait_until

from weightstream.serve_integration import registry
from weightstream.serve_integration.loading.noting import noted_loads

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

APPS = ("plain", "multiplexed", "ingress", "composition", "streaming", "batching")


@pytest.fixture(scope="module", autouse=True)
def apps(cluster: RayCluster) -> Iterator[None]:
    found = {name: import_module(f"examples.{name}").app for name in APPS}
    serve.run(found.pop("plain"), name="plain", route_prefix="/plain")  # its start is a cold one
    serve.run_many([serve.RunTarget(app, name, f"/{name}") for name, app in found.items()])
    yield
    for name in APPS:
        serve.delete(name, _blocking=False)


def ask(cluster: RayCluster, path: str, **headers: str) -> str:
    request = urllib.request.Request(cluster.url(path), headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as response:
        text: str = response.read().decode()
        return text


@pytest.mark.parametrize("name", ["plain", "streaming", "batching"])
def test_one_model_shifts_by_one(cluster: RayCluster, name: str) -> None:
    assert ask(cluster, f"/{name}?text=hello") == "ifmmp"


def test_fastapi_answers(cluster: RayCluster) -> None:
    assert ask(cluster, "/ingress/shift/abc") == '"bcd"'


def test_two_models_in_a_row_undo_each_other(cluster: RayCluster) -> None:
    assert ask(cluster, "/composition?text=hello") == "hello"
    wait_until(lambda: len(noted_loads("composition")) == 2, "both stages have noted their loads")


def test_requests_are_answered_in_batches(cluster: RayCluster) -> None:
    texts = [letter * (1 + place) for place, letter in enumerate("abcdefghijkl")]
    with ThreadPoolExecutor(len(texts), "pytest-ask") as pool:
        answers = list(pool.map(lambda text: ask(cluster, f"/batching?text={text}"), texts))
    assert answers == [chr(ord(text[0]) + 1) * len(text) for text in texts]


def test_a_replica_takes_the_model_that_a_request_names(cluster: RayCluster) -> None:
    """Three models in turn, where two have room: each is pushed out and loaded again."""
    for key in (1, 2, 3, 1, 2, 3):
        answer = ask(cluster, "/multiplexed?text=abc", serve_multiplexed_model_id=str(key))
        assert answer == "".join(chr(ord(letter) + key) for letter in "abc")

    def loads() -> list[str]:
        return [one.uri for found in noted_loads("multiplexed") for one in found.loads]

    wait_until(lambda: len(loads()) == 6, "six loads are noted")
    held = registry.weights_of(registry.Deployment("multiplexed", "Multiplexed"))
    assert "s3://models/shift/3" in {weights.uri for weights in held}
    assert len(held) <= 3
    assert registry.starts_of(registry.Deployment("multiplexed", "Multiplexed")) == ()


def test_a_start_is_recorded(cluster: RayCluster) -> None:
    deployment = registry.Deployment("plain", "Plain")
    wait_until(lambda: registry.starts_of(deployment), "the start is noted")
    (found,) = noted_loads("plain")
    (phases,) = found.loads
    (start,) = registry.starts_of(deployment)
    assert start.node_id == found.node_id
    assert found.node_id in {node.id for node in cluster.workers}
    assert start.warmth == phases.warmth == "origin"
    assert phases.is_start
    assert 0 < phases.process_s <= phases.import_s < phases.ready_s <= start.seconds
    ends = list(phases.ends())
    assert ends[:1] + ends[-2:] == ["process", "to_device", "ready"]
    assert phases.first_byte_s is not None
    assert phases.last_byte_s is not None
    assert phases.import_s - phases.process_s > 0.1  # the fetch began before torch was imported
    assert phases.process_s < phases.first_byte_s <= phases.last_byte_s <= phases.to_device_s
    assert registry.weights_of(deployment) == (
        registry.Weights("s3://models/shift/1", phases.bytes_total),
    )
