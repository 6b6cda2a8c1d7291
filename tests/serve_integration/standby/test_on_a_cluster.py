"""Process standby on a real cluster: replicas get processes that were there before them."""

import json
import os
import sys
import threading
import urllib.request
from collections.abc import Iterator

import pytest
import ray
from tests.kit.ray_cluster import NodeSpec, RayCluster, wait_until

from weightstream.serve_integration.standby import check
from weightstream.serve_integration.standby.processes import Keeper, fill
from weightstream.serve_integration.standby.raylets import Raylets

pytestmark = pytest.mark.ray
MODULES = "json,ray.serve._private.replica"  # torch would be two seconds per process


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster([NodeSpec(cpus=4)], env={check.VARIABLE: MODULES}) as running:
        running.start_serve()
        yield running


def untouched(cluster: RayCluster) -> set[int]:
    """Return the processes that wait on the worker node."""
    with Raylets() as raylets:
        (workers,) = raylets.workers(raylets.nodes()).values()
    assert not isinstance(workers, str)
    return {worker.pid for worker in workers if worker.untouched}


def delete(name: str) -> None:
    from ray import serve

    serve.delete(name)


class Model:
    def __init__(self) -> None:
        self.start = [os.getpid(), "ray.serve._private.replica" in sys.modules]

    def __call__(self) -> list[int | bool]:
        return self.start


def deploy(cluster: RayCluster, name: str, **options: object) -> tuple[int, bool]:
    """Start a deployment of one replica; return its process and whether it had imported."""
    from ray import serve

    options = {"num_cpus": 0.5} | options
    app = serve.deployment(name=name, ray_actor_options=options)(Model).bind()
    serve.run(app, name=name, route_prefix=f"/{name}")
    with urllib.request.urlopen(cluster.url(f"/{name}"), timeout=60) as answer:
        pid, imported = json.load(answer)
    return int(pid), bool(imported)


def test_a_replica_gets_a_process_that_waited_and_it_is_replaced(cluster: RayCluster) -> None:
    (node,) = fill(2)
    assert (node.idle, node.starting, node.problem) == (2, 0, "")
    waiting = untouched(cluster)
    pid, imported = deploy(cluster, "used")
    assert pid in waiting
    assert imported
    assert untouched(cluster) == waiting - {pid}
    fill(2)
    assert len(untouched(cluster)) == 2
    assert untouched(cluster) > waiting - {pid}


def test_what_is_full_stays_as_it_is(cluster: RayCluster) -> None:
    fill(2)
    waiting = untouched(cluster)
    with Keeper(2) as keeper:
        rounds = [keeper.refill()[0] for _ in range(20)]
    assert {(one.idle, one.starting) for one in rounds} == {(2, 0)}
    assert untouched(cluster) == waiting


def test_the_loop_replaces_what_actors_use(cluster: RayCluster) -> None:
    class Busy:
        def pid(self) -> int:
            return os.getpid()

    ended = threading.Event()
    with Keeper(2) as keeper:
        loop = threading.Thread(target=keeper.run, args=(ended, 0.1), name="pytest-keeper")
        loop.start()
        try:
            wait_until(lambda: len(untouched(cluster)) == 2, "two processes wait")
            waiting = untouched(cluster)
            actors = [ray.remote(num_cpus=0.1)(Busy).remote() for _ in range(2)]
            used = set(ray.get([actor.pid.remote() for actor in actors], timeout=60))
            assert used == waiting
            wait_until(lambda: len(untouched(cluster) - waiting) == 2, "two new processes wait")
        finally:
            ended.set()
            loop.join(60)
    for actor in actors:
        ray.kill(actor)
    assert not loop.is_alive()


def test_waiting_processes_leave_the_node_idle(cluster: RayCluster) -> None:
    """Or the autoscaler could never take it back."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    fill(2)
    delete("used")
    gcs = GcsClient(address=cluster.address)

    def idle() -> bool:
        states = get_cluster_resource_state(gcs).node_states
        (state,) = (one for one in states if one.node_id.hex() == cluster.workers[0].id)
        return bool(state.status == NodeStatus.IDLE)

    wait_until(idle, "the node is idle")
    assert len(untouched(cluster)) == 2


def test_a_runtime_environment_gets_a_process_of_its_own_and_is_named(cluster: RayCluster) -> None:
    fill(1)
    waiting = untouched(cluster)
    pid, _ = deploy(cluster, "apart", runtime_env={"env_vars": {"COLOUR": "blue"}})
    assert pid not in waiting
    assert untouched(cluster) == waiting
    found = check.deployments()
    assert found.fresh == (check.Fresh("apart", "apart", "runtime_env: env_vars"),)
    assert found.all_fresh == (found.count == 1)
    delete("apart")


def test_the_probe_names_what_a_node_does_not_import(cluster: RayCluster) -> None:
    (probe,) = check.probe([cluster.workers[0].id])
    assert "torch" in probe.missing
    assert "ray.serve._private.replica" not in probe.missing
    assert probe.resident_bytes > probe.private_bytes > 1 << 20
