"""Three workers with an app alone on each of them, so that two would do; and how to watch them.

Strings to pull, in the registry: see `controller`; and for replicas

test/fail      while it is true, replicas do not start
test/start_s   how long a replica takes to start
"""

import threading
import time
from pathlib import Path
from typing import Any

import ray
from tests.kit.ray_cluster import RayCluster, Replica

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import ledger
from weightstream.serve_integration.compaction.tuning import Tuning

ROOT = Path(__file__).resolve().parents[3]
HOOK = "tests.serve_integration.compaction.controller:install"
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
        time.sleep(registry.recall("test/start_s") or 0)  # type: ignore[arg-type]
        self.name = name

    async def __call__(self) -> str:
        return self.name


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


def controller_pid() -> int:
    from ray._private import state as ray_state

    (found,) = [
        one
        for one in ray_state.actors(actor_state_name="ALIVE").values()
        if one["Name"].startswith("SERVE_CONTROLLER")
    ]
    return int(found["Pid"])


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
