"""Another version in place on a cluster, and what loads tell it: metrics, log lines, registry."""

import json
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import serve
from tests.kit import faults as f
from tests.kit.proxy import FaultProxy
from tests.kit.ray_cluster import RayCluster, Traffic, wait_until
from tests.serve_integration.loading import apps
from tests.serve_integration.loading.test_examples import ask

from weightstream.serve_integration import registry
from weightstream.serve_integration.loading.noting import noted_loads
from weightstream.serve_integration.loading.phases import PHASES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

RELOADING = registry.Deployment("reloading", "Reloading")
BOTH_S = 1.5
"""How long the origin keeps a reload waiting, while the old version answers."""


def configure(key: int) -> None:
    """Say which version is wanted, as `serve deploy` does with a changed config file."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    deployment = {"name": "Reloading", "user_config": {"key": key}}
    application = {
        "name": "reloading",
        "route_prefix": "/reloading",
        "import_path": "examples.ingress:app",
        "deployments": [deployment],
    }
    schema = ServeDeploySchema.model_validate({"applications": [application]})
    client: Any = _get_global_client()
    client.deploy_apps(schema)


@pytest.fixture(scope="module")
def reloading(cluster: RayCluster) -> Iterator[str]:
    configure(1)
    url = cluster.url("/reloading/shift/a")
    wait_until(lambda: len(cluster.running("reloading")) == 1, "the application runs")
    wait_until(lambda: registry.starts_of(RELOADING), "its start is noted")
    yield url
    serve.delete("reloading", _blocking=False)


def test_another_version_loads_in_place(
    cluster: RayCluster, origin: FaultProxy, reloading: str
) -> None:
    (before,) = cluster.running("reloading")
    origin.add(f.When("shift/2/model", "GET", times=None), f.Stall(BOTH_S))
    with Traffic(reloading, per_s=20) as traffic:
        wait_until(lambda: traffic.answers, "the old version answers")
        changed_s = time.monotonic()
        configure(2)
        wait_until(lambda: traffic.answers[-1].body == '"c"', "the new version answers")
    assert traffic.failures() == []
    bodies = [answer.body for answer in sorted(traffic.answers, key=lambda one: one.began_s)]
    meanwhile = [a for a in traffic.answers if a.began_s > changed_s and a.body == '"b"']
    assert len(meanwhile) >= 20 * BOTH_S / 2
    assert max(answer.took_s for answer in meanwhile) < BOTH_S  # none waited for the new one
    assert set(bodies) == {'"b"', '"c"'}
    (after,) = cluster.running("reloading")
    assert after.id == before.id
    (found,) = noted_loads("reloading")
    assert [one.uri[-1] for one in found.loads] == ["1", "2"]
    assert [one.is_start for one in found.loads] == [True, False]
    assert found.loads[1].process_s == 0.0
    assert len(registry.starts_of(RELOADING)) == 1
    wait_until(
        lambda: [one.uri for one in registry.weights_of(RELOADING)] == ["s3://models/shift/2"],
        "only the new version is wanted",
    )


def test_a_version_that_cannot_be_loaded_leaves_the_old_one(
    cluster: RayCluster, reloading: str
) -> None:
    (before,) = cluster.running("reloading")
    answered = ask(cluster, "/reloading/shift/a")
    with Traffic(reloading, per_s=20) as traffic:
        configure(99)
        wait_until(lambda: "shift/99 is not loaded" in session_logs(), "it is said")
        wait_until(lambda: status("reloading") == "RUNNING", "Serve is content")
    assert {(one.status, one.body) for one in traffic.answers} == {(200, answered)}
    assert [one.id for one in cluster.running("reloading")] == [before.id]
    wait_until(
        lambda: metric(before.node_id, "ray_weightstream_failed_reloads_total", "reloading"),
        "it is counted",
    )


def test_phases_and_bytes_are_metrics_of_the_node(cluster: RayCluster, reloading: str) -> None:
    (replica,) = cluster.running("reloading")

    def seen(name: str, label: str) -> set[str]:
        return {labels[label] for labels, _ in metric(replica.node_id, name, "reloading")}

    phases = "ray_weightstream_load_phase_seconds_count"
    wait_until(lambda: seen(phases, "phase") == set(PHASES), "every phase is there")
    loads = metric(replica.node_id, "ray_weightstream_loads_total", "reloading")
    assert {labels["warmth"] for labels, _ in loads} <= {"origin", "disk", "memory"}
    assert sum(value for _, value in loads) == len(noted_loads("reloading")[0].loads)
    count = sum(
        value for _, value in metric(replica.node_id, "ray_weightstream_load_bytes_total", "reload")
    )
    assert count == sum(one.bytes_total for one in noted_loads("reloading")[0].loads)
    (labels, _), *_ = loads
    assert labels["deployment"] == "Reloading"
    assert labels["replica"] == replica.id


def test_a_load_is_a_line_of_the_replica_s_log(cluster: RayCluster, reloading: str) -> None:
    (replica,) = cluster.running("reloading")
    lines = [one for one in session_logs().splitlines() if "shift/1 is ready" in one]
    (line,) = [one for one in lines if f"reloading#Reloading {replica.id}" in one]
    assert " bytes from " in line
    assert all(f"{phase} " in line for phase in ("process", "import", "header", "ready"))


def test_models_that_are_pushed_out_give_their_memory_back(cluster: RayCluster) -> None:
    serve.run(apps.Few.bind(), name="few", route_prefix="/few")  # type: ignore[attr-defined]
    for key in (1, 2, 3, 4, 1):
        text, alive = ask(cluster, "/few?text=a", serve_multiplexed_model_id=str(key)).split()
        assert text == chr(ord("a") + key)
        assert int(alive) <= 2
    serve.delete("few", _blocking=False)


def test_with_another_ray_loads_work_and_one_message_says_what_does_not(
    cluster: RayCluster,
) -> None:
    serve.run(apps.OtherRay.bind(), name="other", route_prefix="/other")  # type: ignore[attr-defined]
    one, two, *said = json.loads(ask(cluster, "/other?text=a"))
    assert (one, two) == ("b", "c")
    (message,) = said
    assert "loads work" in message
    assert "Ray 2.60" in message
    serve.delete("other", _blocking=False)


def status(app: str) -> str:
    return str(serve.status().applications[app].status.value)


def session_logs() -> str:
    node: Any = ray._private.worker._global_node
    return apps.session_logs(Path(node.get_session_dir_path()))


def metric(node_id: str, name: str, app: str) -> list[tuple[Mapping[str, str], float]]:
    """Return what a node's Prometheus endpoint says of an application, by labels."""
    from prometheus_client.parser import text_string_to_metric_families

    (node,) = (one for one in ray.nodes() if one["NodeID"] == node_id)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    read: Callable[..., Any] = opener.open
    with read(url, timeout=20) as response:
        text = response.read().decode()
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and sample.labels.get("application", "").startswith(app)
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_part_of_a_gpu_is_a_gpu_and_none_is_none(cluster: RayCluster, tmp_path: Path) -> None:
    """As far as it goes without one: where a load wants its tensors, by what Ray assigned."""
    where = cluster._cluster.add_node(
        num_cpus=0,
        num_gpus=1,
        object_store_memory=100 << 20,
        include_dashboard=False,
        env_vars=cluster._env | {"WEIGHTSTREAM_STORE": str(tmp_path / "store")},
    )
    try:
        tried: Any = ray.remote(num_cpus=0, num_gpus=0.5)(apps.try_to_load)
        half, other = ray.get([tried.remote(None), tried.remote(None)], timeout=60)
        assert "no CUDA device" in half
        assert "no CUDA device" in other
        assert ray.get(tried.remote("cpu"), timeout=60) == "bcd"
        none: Any = ray.remote(num_cpus=0)(apps.try_to_load)
        assert ray.get(none.remote(None), timeout=60) == "bcd"
    finally:
        cluster._cluster.remove_node(where)
