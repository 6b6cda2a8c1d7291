"""One run of `fleet`: a cluster of its own, a trace, traffic, and an autoscaler that takes nodes.

Ray's waits and ours are a sixtieth of their defaults: 5 s of stability for 300 s, and so on. So is
the autoscaler's: it takes a node that was idle for 5 s, in the way in which Ray's does.
"""

import argparse
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from weightstream.bench.errors import BenchError
from weightstream.bench.serve.apps import Serving
from weightstream.bench.serve.fleet_trace import CPUS, Trace, node_seconds, trace
from weightstream.bench.serve.traffic import Traffic
from weightstream.serve_integration.compaction import tuning
from weightstream.serve_integration.compaction.tuning import Tuning

_FASTER = 60.0
"""How much faster than by default every wait is."""
_IDLE_S = 300 / _FASTER
_LOAD_S = 1.0
_TIMEOUT_S = 300.0
_HERE = "weightstream.bench.serve.fleet_run"
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY": "1",  # also without compaction: the same placement
    "RAY_SERVE_NODE_COMPACTION_DELAY_S": str(300 / _FASTER),
}
_CALLBACK = "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"
KINDS: Mapping[str, Mapping[str, str]] = {
    "none": {"RAY_SERVE_NODE_COMPACTION_DELAY_S": "1e9"},
    "ray": {_CALLBACK: f"{_HERE}:install_nothing"},
    "weightstream": {_CALLBACK: f"{_HERE}:install"},
    "no look back": {_CALLBACK: f"{_HERE}:install"},
}
"""Who compacts -> what is in the controller's environment. `no look back` is ours, too, without the
room that it keeps for the load of lately: as Ray's, which keeps none."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    kind: str
    nodes: int
    """Workers at the end."""
    best: int
    """Workers that best fit decreasing needs."""
    node_seconds: float
    gone_at_s: tuple[float, ...]
    requests: int
    streams: int
    failures: tuple[str, ...]
    p99_s: float


class Sized(Serving):
    """An app that loads nothing, for a second."""

    def __init__(self) -> None:
        time.sleep(_LOAD_S)


def install_nothing() -> None:
    """Have the controller look for nodes as often as the faster clock wants."""
    from ray.serve._private import deployment_scheduler

    every = "COMPACTION_SCAN_INTERVAL_S"
    setattr(deployment_scheduler, every, getattr(deployment_scheduler, every) / _FASTER)


def install() -> None:
    """Install the plug-in, too."""
    from weightstream.serve_integration.compaction import plugin

    install_nothing()
    plugin.install()


class Autoscaler:
    """Takes workers that are idle for long enough, until the block ends."""

    def __init__(self) -> None:
        self.gone_at_s: list[float] = []
        self._began_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Autoscaler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)

    def _run(self) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        reason = DrainNodeReason.DRAIN_NODE_REASON_IDLE_TERMINATION
        while not self._ended.wait(0.25):
            for node_id in _idle(gcs):
                if gcs.drain_node(node_id, reason, "idle, for the bench", 0)[0]:
                    self.gone_at_s.append(time.monotonic() - self._began_s)


def _idle(gcs: Any) -> Iterator[str]:
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    for one in get_cluster_resource_state(gcs).node_states:
        is_worker = one.total_resources.get("CPU", 0) > 0
        if is_worker and one.status == NodeStatus.IDLE and one.idle_duration_ms >= 1000 * _IDLE_S:
            yield one.node_id.hex()


def main() -> None:
    """Run, and print the outcome as JSON on the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--tail", type=float, required=True)
    given = parser.parse_args()
    os.environ.update({**_ENVIRONMENT, **KINDS[given.kind]})
    with _cluster() as cluster:
        if KINDS[given.kind].get(_CALLBACK, "").endswith(":install"):
            _tune(0.0 if given.kind == "no look back" else Tuning().look_back_s)
        print(json.dumps(asdict(_run(given.kind, cluster, trace(given.seed, given.tail)))))


@contextmanager
def _cluster() -> Iterator[Cluster]:
    """Start a head without CPUs, and Serve on it."""
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": _port()})
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _tune(look_back_s: float) -> None:
    usual = Tuning()
    tuning.write(
        Tuning(
            cooldown_s=usual.cooldown_s / _FASTER,
            backoff_s=usual.backoff_s / _FASTER,
            look_back_s=look_back_s / _FASTER,
        )
    )


def _run(kind: str, cluster: Cluster, planned: Trace) -> Outcome:
    for targets in planned.growth:
        cluster.add_node(num_cpus=CPUS, object_store_memory=100 << 20)
        _grow(planned, targets)
    left = [app for app, count in planned.steps[-1].targets.items() if count]
    with ExitStack() as stack:
        traffic = [stack.enter_context(Traffic(_url(app), 3.0, 0.2)) for app in left]
        scaler = stack.enter_context(Autoscaler())
        began_s = time.monotonic()
        for step in planned.steps:
            _sleep_until(began_s + step.at_s)
            for app, count in step.targets.items():
                _set(app, count)
        _sleep_until(began_s + planned.end_s)
    return _outcome(kind, planned, scaler.gone_at_s, traffic)


def _outcome(kind: str, planned: Trace, gone: list[float], traffic: list[Traffic]) -> Outcome:
    gone = [at_s for at_s in gone if at_s < planned.end_s]
    found = [one.summary() for one in traffic]
    return Outcome(
        kind,
        len(planned.growth) - len(gone),
        planned.best,
        node_seconds(gone, planned.end_s),
        tuple(gone),
        sum(one.requests for one in found),
        sum(one.streams for one in found),
        tuple(failure for one in found for failure in one.failures),
        max(one.p99_s for one in found),
    )


def _grow(planned: Trace, targets: Mapping[str, int]) -> None:
    """Run so many more replicas; there is only room for them on the worker that has joined."""
    there = Counter(app for app, _ in _running())
    for app, count in targets.items():
        if there[app]:
            _set(app, there[app] + count)
        else:
            _deploy(app, planned.sizes[app], count)
    wanted = there + Counter(targets)
    _wait(lambda: Counter(app for app, _ in _running()) == wanted, f"{wanted} run")


def _deploy(app: str, cpus: float, count: int) -> None:
    made = serve.deployment(
        name=app,
        num_replicas=count,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=100,
        graceful_shutdown_wait_loop_s=0.5,
    )(Sized)
    target = serve.RunTarget(made.bind(), app, f"/{app}", external_scaler_enabled=True)
    serve.run_many([target], wait_for_applications_running=False)


def _set(app: str, count: int) -> None:
    from ray.serve._private.common import DeploymentID

    ray.get(_client()._controller.update_deployment_replicas.remote(DeploymentID(app, app), count))


def _running() -> list[tuple[str, str]]:
    """Return (app, node) of every replica that runs."""
    return [
        (app, one["node_id"])
        for app, about in _client().get_serve_details()["applications"].items()
        for found in about["deployments"].values()
        for one in found["replicas"]
        if str(one["state"]).endswith("RUNNING")
    ]


def _client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client()


def _url(app: str) -> str:
    config = _client().http_config
    return f"http://127.0.0.1:{config.port}/{app}"


def _wait(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline_s:
            raise BenchError(f"{what}: not within {_TIMEOUT_S:g} s")
        time.sleep(0.2)


def _sleep_until(at_s: float) -> None:
    time.sleep(max(0.0, at_s - time.monotonic()))


if __name__ == "__main__":
    main()
