"""Process standby on a real cluster: replicas get processes that were there before them."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from tests.conftest import LogWatch
from tests.kit.ray_cluster import NodeSpec, RayCluster, wait_until
from tests.kit.s3 import free_port

from weightstream.serve_integration.standby import check
from weightstream.serve_integration.standby.processes import Keeper, fill
from weightstream.serve_integration.standby.raylets import Node, Raylets

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


def test_a_ray_without_the_call_turns_it_off_with_one_line(
    cluster: RayCluster, expect_log: LogWatch
) -> None:
    expect_log("Ray .* lacks what starts processes ahead .*GetNodeStats.*; it is off, all else")
    with Keeper(1) as keeper:
        keeper._raylets._stub = lambda channel: object()
        keeper.run(threading.Event())
    assert len(expect_log.messages()) == 1


def test_a_node_that_does_not_answer_is_named_and_the_others_are_filled(
    cluster: RayCluster,
) -> None:
    gone = Node("f" * 56, f"127.0.0.1:{free_port()}", 1)
    with Raylets() as raylets:
        answers = raylets.workers([gone, *raylets.nodes()])
        assert answers.pop(gone.id) == "UNAVAILABLE"
        assert all(isinstance(answer, list) for answer in answers.values())


def test_it_is_off_while_every_deployment_has_an_environment(
    cluster: RayCluster, expect_log: LogWatch
) -> None:
    expect_log("no deployment can use processes that wait")
    deploy(cluster, "apart", runtime_env={"env_vars": {"COLOUR": "red"}})
    before = untouched(cluster)
    ended = threading.Event()
    with Keeper(len(before) + 2) as keeper:
        loop = threading.Thread(target=keeper.run, args=(ended, 0.1), name="pytest-keeper")
        loop.start()
        wait_until(lambda: expect_log.messages("no deployment can use"), "it says so")
        ended.set()
        loop.join(60)
        assert keeper.refill()[0].starting == 0
    delete("apart")
    assert untouched(cluster) == before


def test_the_command_fills_and_shows(cluster: RayCluster) -> None:
    line = ["serve", "standby", "--processes", "2", "--address", cluster.address, "--json"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "weightstream.cli", *line],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    report = json.loads(done.stdout)
    assert [node["idle"] for node in report["nodes"]] == [2]
    assert "start Ray there like this" in done.stderr
    assert len(untouched(cluster)) == 2


def test_a_cluster_that_asks_for_a_token_is_filled_with_it() -> None:
    """In a process of its own, for Ray reads the mode of authentication once."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-that-opens-nothing"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.serve_integration.standby.with_token"],
        env=os.environ | token,
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "idle 1\nrefused the raylet at" in done.stdout
