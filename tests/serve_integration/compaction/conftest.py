"""The plug-in in a real controller: three workers of two CPUs, real replicas."""

from collections.abc import Iterator

import pytest
import ray
from tests.kit.ray_cluster import NodeSpec, RayCluster, wait_until
from tests.serve_integration.compaction.scene import HOOK, REST, ROOT, App, layout, state, weights

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import ledger, tuning


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    env = {
        "PYTHONPATH": str(ROOT),
        "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": HOOK,
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
    for key in ("hold", "warmed", "broken", "fail", "start_s", "agents"):
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
    # Deleted in mid-move, they would make it fail, and nothing moves for `GO.backoff_s` after that.
    wait_until(lambda: state().phase != "moving", "the move is over")
    for name in places:
        serve.delete(name, _blocking=False)
    wait_until(lambda: not cluster.replicas(), "all is deleted")
    wait_until(lambda: state().node_id == "", "no node is emptied any more")
    wait_until(lambda: ray.available_resources().get("CPU") == 6, "and its room is free")
