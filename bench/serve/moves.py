"""Move replicas under traffic: `python -m ... URI [--replicas 3]`.

Runs in a cluster (see `cluster.Cluster.drive`) with agents and a waiting process on each node. One
row per move: what came of all requests, how many replicas served at the least, how long Ray's
replacements took.

    rolling     all replicas are replaced by a new version
    agents      every agent is killed and brought up again
    migration   the other nodes hold the weights, then a node is drained
"""

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray import serve
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.serve.context import _get_global_client

from weightstream.bench.errors import BenchError
from weightstream.bench.serve import apps
from weightstream.bench.serve.traffic import Traffic
from weightstream.serve_integration import nodes, registry
from weightstream.serve_integration.nodes.tasks import on_node
from weightstream.serve_integration.standby import processes

_APP, _NAME = "bench", "Model"
_URL = "http://127.0.0.1:8000/"
_TIMEOUT_S = 240.0
_LEAST_REQUESTS = 1000
_LOOK_EVERY_S = 0.05
_SETTLE_S = 8.0  # until torch is imported in the processes that wait, on two cores
_PREEMPTION = 2
_SERVES = ("RUNNING", "PENDING_MIGRATION")


@dataclass(frozen=True, slots=True)
class Row:
    """What a move came to."""

    move: str
    requests: int
    streams: int
    failures: tuple[str, ...]
    p50_s: float
    p99_s: float
    wanted: int
    served_least: int
    """Replicas that served at once, at the least."""
    replacements_s: tuple[float, ...]
    """From Ray's start of a replica until it ran."""
    took_s: float


class Watch:
    """Looks at the replicas until the block ends."""

    def __init__(self) -> None:
        self.least = 1 << 30
        self._began: dict[str, float] = {}
        self._ran: dict[str, float] = {}
        self._old = {one["replica_id"] for one in _replicas()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)

    def replacements_s(self) -> tuple[float, ...]:
        """Return how long each new replica took."""
        return tuple(round(at - self._began[one], 3) for one, at in self._ran.items())

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            found, now_s = _replicas(), time.monotonic()
            self.least = min(self.least, _serving(found))
            for one in found:
                name = one["replica_id"]
                if name in self._old:
                    continue
                self._began.setdefault(name, now_s)
                if _state(one) == "RUNNING":
                    self._ran.setdefault(name, now_s)


def main() -> None:
    """Deploy, move, and print a row for each move."""
    parser = argparse.ArgumentParser()
    parser.add_argument("uri")
    parser.add_argument("--replicas", type=int, default=3)
    given = parser.parse_args()
    ray.init(log_to_driver=False)
    nodes.up([given.uri])
    try:
        print(json.dumps([asdict(row) for row in _rows(given.uri, given.replicas)]))
    finally:
        nodes.down()


def _rows(uri: str, replicas: int) -> Iterator[Row]:
    _deploy(uri, replicas, "1")
    _prepare(uri)
    yield _measure("rolling", replicas, lambda: _deploy(uri, replicas, "2"))
    yield _measure("agents", replicas, lambda: _restart_agents(uri))
    _prepare(uri)
    yield _measure("migration", replicas, _drain_one)
    serve.delete(_APP)


def _deploy(uri: str, replicas: int, version: str) -> None:
    options = {"ray_actor_options": {"num_cpus": 1}, "max_ongoing_requests": 200}
    deployment = serve.deployment(name=_NAME, num_replicas=replicas, **options)(apps.Serving)
    serve.run(deployment.bind(uri, version), name=_APP, route_prefix="/")


def _prepare(uri: str) -> None:
    """Let every node hold the weights, and have a process that waits."""
    if not nodes.warm(uri).wait(_TIMEOUT_S):
        raise BenchError(f"{uri}: not every node held it within {_TIMEOUT_S:g} s")
    processes.fill(1)
    time.sleep(_SETTLE_S)


def _restart_agents(uri: str) -> None:
    for node_id, agent in registry.agents().items():
        on_node(_kill, node_id, 30, agent.pid)
    nodes.up([uri])


def _kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return pid


def _drain_one() -> None:
    node_id = _replicas()[0]["node_id"]
    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = gcs.drain_node(node_id, _PREEMPTION, "a move, for the bench", 0)
    if not accepted:
        raise BenchError(f"node {node_id} is not drained: {why}")
    with _limit(f"replicas leave node {node_id}") as is_late:
        while any(one.get("node_id") == node_id for one in _replicas()):
            is_late()
            time.sleep(0.1)


def _measure(move: str, replicas: int, act: Callable[[], None]) -> Row:
    with Traffic(_URL) as traffic, Watch() as watch:
        time.sleep(2.0)
        began_s = time.monotonic()
        act()
        with _limit(f"{move} ends") as is_late:
            while _serving(_replicas()) != replicas or len(_replicas()) != replicas:
                is_late()
                time.sleep(0.1)
        took_s = time.monotonic() - began_s
        with _limit(f"{_LEAST_REQUESTS} requests") as is_late:
            while len(traffic.answers) < _LEAST_REQUESTS:
                is_late()
                time.sleep(0.1)
    came = traffic.summary()
    return Row(
        move, came.requests, came.streams, came.failures, came.p50_s, came.p99_s,
        replicas, watch.least, watch.replacements_s(), took_s,
    )  # fmt: skip


def _replicas() -> list[dict[str, Any]]:
    details: dict[str, Any] = _get_global_client().get_serve_details()
    found = details["applications"][_APP]["deployments"][_NAME]["replicas"]
    return [one for one in found if _state(one) != "STOPPING"]


def _state(replica: dict[str, Any]) -> str:
    return str(replica["state"]).rpartition(".")[2]


def _serving(replicas: list[dict[str, Any]]) -> int:
    return sum(_state(one) in _SERVES for one in replicas)


@contextmanager
def _limit(what: str) -> Iterator[Callable[[], None]]:
    """Give a check that raises when a wait takes too long."""
    deadline = time.monotonic() + _TIMEOUT_S

    def check() -> None:
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {_TIMEOUT_S:g} s")

    yield check


if __name__ == "__main__":
    main()
