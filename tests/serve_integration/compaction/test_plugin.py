"""The plug-in in a real controller: three workers of two CPUs, real replicas, real traffic."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from tests.kit.ray_cluster import NodeSpec, RayCluster, Replica, Traffic, wait_until

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import ledger, tuning
from weightstream.serve_integration.compaction.tuning import Tuning

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[3]
REST = Tuning(1e6, look_back_s=0)
"""Nothing moves."""
GO = Tuning(
    stable_s=0.5, look_back_s=0, cooldown_s=0, backoff_s=1e6, backoff_max_s=1e6, release_s=1
)
URI = "s3://models/{}"


class App:
    def __init__(self, name: str) -> None:
        if registry.recall("test/fail"):
            raise RuntimeError("a replica that does not start, for a test")
        self.name = name

    async def __call__(self) -> str:
        return self.name


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    env = {
        "PYTHONPATH": str(ROOT),
        "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": (
            "tests.serve_integration.compaction.controller:install"
        ),
        "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1",
        "RAY_SERVE_NODE_COMPACTION_DELAY_S": "0.5",
    }
    with RayCluster([NodeSpec()] * 3, env=env) as running:
        running.start_serve()
        yield running


@pytest.fixture
def apps(cluster: RayCluster) -> Iterator[dict[str, str]]:
    """Run `a`, `b` and `c`, each alone on a node; return where."""
    from ray import serve

    tuning.write(REST)
    ledger.hurry(0)
    for key in ("hold", "warmed", "broken", "fail"):
        registry.note(f"test/{key}", None)
    places = {name: node.id for name, node in zip("abc", cluster.workers, strict=True)}
    registry.note("test/place", places)
    options = {"num_cpus": 1}
    deployment = serve.deployment(ray_actor_options=options, graceful_shutdown_wait_loop_s=0.2)(App)
    for name in places:
        registry.note_weights(registry.Deployment(name, "App"), [weights(name)])
    serve.run_many([serve.RunTarget(deployment.bind(n), n, f"/{n}") for n in places])
    registry.note("test/place", None)
    assert layout(cluster) == places
    yield places
    for name in places:
        serve.delete(name, _blocking=False)
    wait_until(lambda: not cluster.replicas(), "all is deleted")
    wait_until(lambda: state().node_id == "", "no node is emptied any more")
    wait_until(lambda: ray.available_resources().get("CPU") == 6, "and its room is free")


def weights(name: str) -> registry.Weights:
    return registry.Weights(URI.format(name), 1 << 20)


def layout(cluster: RayCluster) -> dict[str, str]:
    return {one.app: one.node_id for one in cluster.running()}


def at_rest(cluster: RayCluster) -> bool:
    return sorted((one.app, one.state) for one in cluster.replicas()) == [
        (name, "RUNNING") for name in "abc"
    ]


class Watch:
    """Notes the fewest running replicas of each app, until the block ends."""

    def __init__(self, cluster: RayCluster) -> None:
        self.fewest = dict.fromkeys("abc", 1)
        self._cluster, self._ended = cluster, threading.Event()
        self._thread = threading.Thread(target=self._run, name="pytest-watch")

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            serving = [one.app for one in self._cluster.replicas() if serves(one)]
            for app, fewest in self.fewest.items():
                self.fewest[app] = min(fewest, serving.count(app))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)


def serves(replica: Replica) -> bool:
    return replica.state in ("RUNNING", "PENDING_MIGRATION")


def controller_log() -> str:
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    return "".join(path.read_text() for path in folder.glob("controller_*.log"))


def test_replicas_move_to_fewer_nodes_and_nobody_notices(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    registry.note("test/hold", True)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch(cluster))
        traffic = [stack.enter_context(Traffic(cluster.url(f"/{name}"), per_s=20)) for name in apps]
        tuning.write(GO)
        wait_until(lambda: registry.recall("test/warmed"), "destinations are warmed")
        assert at_rest(cluster), "nothing moves before its destination is warm"
        registry.note("test/hold", None)
        wait_until(lambda: len(set(layout(cluster).values())) == 2, "two nodes are enough")
        wait_until(lambda: at_rest(cluster), "the old replica is gone")
        wait_until(lambda: state().emptied == 1, "the plug-in counts it")
    assert [one.failures() for one in traffic] == [[], [], []]
    assert watch.fewest == {"a": 1, "b": 1, "c": 1}
    after = layout(cluster)
    (moved,) = [name for name in apps if after[name] != apps[name]]
    assert registry.recall("test/warmed") == [{after[moved]: [URI.format(moved)]}]


def test_a_node_with_somebody_elses_actor_is_left_alone(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    actors = [foreign_actor(apps["a"]), foreign_actor(apps["c"])]
    try:
        tuning.write(GO)
        wait_until(lambda: layout(cluster).get("b") in (apps["a"], apps["c"]), "b has moved")
        wait_until(lambda: at_rest(cluster), "the old replica is gone")
        wait_until(lambda: busy() == {apps["a"], apps["c"]}, "the state says why not more")
        assert layout(cluster) == {**apps, "b": layout(cluster)["b"]}
    finally:
        for actor in actors:
            ray.kill(actor)


def test_replacements_that_never_start_are_given_up_and_nothing_is_lost(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    registry.note("test/fail", True)
    before = state().failures
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch(cluster))
        traffic = [stack.enter_context(Traffic(cluster.url(f"/{name}"), per_s=10)) for name in apps]
        tuning.write(GO)
        wait_until(lambda: state().failures > before, "the plug-in gives up")
        registry.note("test/fail", None)
        wait_until(lambda: at_rest(cluster), "surplus replicas are gone")
    assert layout(cluster) == apps
    assert [one.failures() for one in traffic] == [[], [], []]
    assert watch.fewest == {"a": 1, "b": 1, "c": 1}
    assert "cancelled emptying node" in controller_log()


def test_when_the_plugin_fails_ray_goes_on_alone(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    registry.note("test/broken", True)
    tuning.write(GO)
    ledger.hurry(60)  # no wait after the failure of another test
    with Traffic(cluster.url("/a"), per_s=10) as traffic:
        wait_until(lambda: len(set(layout(cluster).values())) == 2, "Ray compacts by itself")
        wait_until(lambda: at_rest(cluster), "the old replica is gone")
    assert traffic.failures() == []
    assert registry.recall("test/warmed") is None
    assert "failed while choosing a node; Ray's own behaviour holds" in controller_log()
    assert "broken by a test" in controller_log()


def foreign_actor(node_id: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Foreign:
        def ping(self) -> int:
            return 1

    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    actor: Any = ray.remote(num_cpus=0, scheduling_strategy=where)(Foreign)
    handle = actor.remote()
    assert ray.get(handle.ping.remote(), timeout=60) == 1
    return handle


def state() -> ledger.State:
    return ledger.read_state() or ledger.State("unknown", "the plug-in has said nothing yet")


def busy() -> set[str]:
    return {node_id for node_id, outcome, _ in state().verdicts if outcome == "busy"}
