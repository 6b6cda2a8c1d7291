"""Room that Ray's own autoscaler holds, and gives back."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from tests.conftest import LogWatch
from tests.kit.ray_cluster import wait_until
from tests.serve_integration.standby.autoscaler import MOST_NODES, NODE_CPUS, autoscaling_cluster

from weightstream.errors import ClusterError
from weightstream.serve_integration.standby.capacity import Holder, Holding, Step, release
from weightstream.serve_integration.standby.schedule import parse

pytestmark = pytest.mark.ray
ONE_CPU = {"CPU": 1.0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with autoscaling_cluster() as address:
        yield address
    patch.undo()


def until(holder: Holder, what: str, holds: Callable[[Holding], bool]) -> Holding:
    """Refresh until the holding is as expected; return it."""
    found = [holder.refresh()]

    def refreshed() -> bool:
        found.append(holder.refresh())
        return holds(found[-1])

    wait_until(refreshed, what)
    return found[-1]


class Busy:
    def ready(self) -> bool:
        return True


def test_room_is_held_beside_what_runs_and_given_back(cluster: str, expect_log: LogWatch) -> None:
    holder = Holder(Step(ONE_CPU, size=2), parse("1"))
    found = until(holder, "a node with room for one step of two", lambda one: one.room == NODE_CPUS)
    assert len(found.nodes) == 1

    actor = ray.remote(num_cpus=1)(Busy).remote()
    ray.get(actor.ready.remote(), timeout=60)
    until(holder, "as much beside the actor", lambda one: one.room == 3)

    expect_log("cannot hold room for 10 replicas")
    too_much = Holder(Step(ONE_CPU, size=10), parse("1"))
    found = until(too_much, "what two nodes can have", lambda one: one.room >= one.asked)
    assert found.wanted == 10
    assert 0 < found.asked < MOST_NODES * NODE_CPUS

    ray.kill(actor)
    nothing = Holder(Step(ONE_CPU), parse("0"))
    until(nothing, "every node is given back", lambda one: one.room == 0)


def test_what_somebody_else_holds_is_not_let_go(cluster: str) -> None:
    from ray.autoscaler.sdk import request_resources

    release()
    request_resources(bundles=[{"CPU": 1}] * 2)
    holder = Holder(Step(ONE_CPU), parse("1"))
    with pytest.raises(ClusterError, match="somebody holds 2 bundles"):
        holder.refresh()
    release()
    assert holder.refresh().asked == 1
    holder.release()


def held() -> int:
    """Return how many bundles the cluster is asked to hold."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(gcs_client())
    found = [one for each in state.cluster_resource_constraints for one in each.resource_requests]
    return sum(one.count for one in found)


def gcs_client() -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=ray.get_runtime_context().gcs_address)


def test_the_command_holds_while_it_watches(cluster: str) -> None:
    line = ["serve", "standby", "--address", cluster, "--steps", "0, 00:00-24:00=1", "--watch"]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, "-m", "weightstream.cli", *line, "--replica", "CPU=2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            wait_until(lambda: held() == 1 or running.poll() is not None, "one bundle is held")
            running.send_signal(signal.SIGTERM)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 0, said
    assert "asked for: 1\n" in said
    assert held() == 0


def test_the_command_refuses_what_is_wrong_before_it_connects() -> None:
    from weightstream.cli import main

    assert main(["serve", "standby", "--release", "--steps", "1"]) == 2
    assert main(["serve", "standby", "--model", "s3://models/llama"]) == 2
    assert main(["serve", "standby", "--steps", "often"]) == 2
    assert main(["serve", "standby", "--steps", "1", "--replica", "GPU"]) == 2
