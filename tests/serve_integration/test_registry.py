"""The registry on a real cluster: what one process notes, another reads."""

from collections.abc import Iterator

import pytest
import ray
from tests.kit.ray_cluster import NodeSpec, RayCluster, Traffic, wait_until

from weightstream.serve_integration import registry

pytestmark = pytest.mark.ray
DEPLOYMENT = registry.Deployment("app", "Model")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster([NodeSpec(cpus=1)]) as running:
        yield running


def test_what_a_worker_notes_the_driver_reads(cluster: RayCluster) -> None:
    def work() -> None:
        registry.note_weights(DEPLOYMENT, [registry.Weights("s3://bucket/model", 7)])

    assert registry.weights_of(DEPLOYMENT) == ()
    ray.get(ray.remote(work).remote(), timeout=60)
    assert registry.weights_of(DEPLOYMENT) == (registry.Weights("s3://bucket/model", 7),)
    assert registry.weights_of(registry.Deployment("other", "Model")) == ()


def test_only_the_last_starts_are_kept(cluster: RayCluster) -> None:
    starts = [registry.Start(cluster.workers[0].id, "peer", float(i), i) for i in range(20)]
    for start in starts:
        registry.note_start(DEPLOYMENT, start)
    assert registry.starts_of(DEPLOYMENT) == tuple(starts[-8:])


def test_agents_come_and_go(cluster: RayCluster) -> None:
    agent = registry.Agent(cluster.workers[0].id, "/run/agent.sock", "10.0.0.1:7471", "token", 1)
    registry.note_agent(agent)
    assert registry.agents() == {agent.node_id: agent}
    registry.forget_agent(agent.node_id)
    assert registry.agents() == {}


def test_what_is_damaged_counts_as_absent(cluster: RayCluster) -> None:
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put("weights/app/Bad", b"{", namespace="weightstream")
    assert registry.weights_of(registry.Deployment("app", "Bad")) == ()
    internal_kv._internal_kv_put("weights/app/Bad", b'[{"of": 1}]', namespace="weightstream")
    assert registry.weights_of(registry.Deployment("app", "Bad")) == ()


def test_serve_answers_on_the_cluster(cluster: RayCluster) -> None:
    from ray import serve

    class Hello:
        def __call__(self) -> str:
            return "hello"

    cluster.start_serve()
    deployment = serve.deployment(ray_actor_options={"num_cpus": 0.5})(Hello)
    serve.run(deployment.bind(), name="hello", route_prefix="/hello")
    wait_until(lambda: len(cluster.running("hello")) == 1, "one replica runs")
    with Traffic(cluster.url("/hello"), per_s=20) as traffic:
        wait_until(lambda: len(traffic.answers) >= 10, "ten answers")
    assert traffic.failures() == []
    assert cluster.running("hello")[0].node_id == cluster.workers[0].id
