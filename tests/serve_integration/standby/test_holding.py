"""Room that Ray's own autoscaler holds, and gives back."""

from collections.abc import Callable, Iterator

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
def cluster() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with patch.context(), autoscaling_cluster():
        yield
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


def test_room_is_held_beside_what_runs_and_given_back(cluster: None, expect_log: LogWatch) -> None:
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


def test_what_somebody_else_holds_is_not_let_go(cluster: None) -> None:
    from ray.autoscaler.sdk import request_resources

    release()
    request_resources(bundles=[{"CPU": 1}] * 2)
    holder = Holder(Step(ONE_CPU), parse("1"))
    with pytest.raises(ClusterError, match="somebody holds 2 bundles"):
        holder.refresh()
    release()
    assert holder.refresh().asked == 1
    holder.release()
