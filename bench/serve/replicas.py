"""Time replicas from the decision to the first answer: `python -m ... LOADER [--agents] ...`.

Runs in a cluster (see `cluster.Cluster.drive`). A first replica is started, then a second one by
asking the controller for two; a sample is the time until an answer comes from the new one.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from weightstream.bench.errors import BenchError

_TIMEOUT_S = 240.0
_APP = "bench"


@dataclass(frozen=True, slots=True)
class Started:
    """One replica's start."""

    seconds: float
    """From the decision to its first answer."""
    init_s: float
    node: str


def main() -> None:
    """Start the first, then the second, and print both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("loader", choices=["Streamed", "Downloaded"])
    parser.add_argument("uri")
    parser.add_argument("--agents", action="store_true", help="run weightstream's agents")
    parser.add_argument("--standby", type=int, default=0, help="processes that wait, per node")
    parser.add_argument("--second", action="store_true", help="start a second one")
    given = parser.parse_args()
    ray.init(log_to_driver=False)
    with _agents(given.uri if given.agents else None):
        _stand_by(given.standby)
        started = list(_starts(given.loader, given.uri, 2 if given.second else 1))
    print(json.dumps([asdict(one) for one in started]))


@contextmanager
def _agents(uri: str | None) -> Iterator[None]:
    if uri is None:
        yield
        return
    from weightstream.serve_integration import nodes

    nodes.up([uri])
    try:
        yield
    finally:
        nodes.down()


def _stand_by(processes: int) -> None:
    if not processes:
        return
    from weightstream.serve_integration.standby import processes as standby

    standby.fill(processes)
    time.sleep(8.0)  # until torch is imported in them, on two cores


def _starts(loader: str, uri: str, count: int) -> Iterator[Started]:
    from weightstream.bench.serve import apps

    options = {"ray_actor_options": {"num_cpus": 1}, "max_ongoing_requests": 100}
    deployment = serve.deployment(name="Model", **options)(getattr(apps, loader))
    seen: set[str] = set()
    for replicas in range(1, count + 1):
        began_s = time.monotonic()
        if replicas == 1:
            app = deployment.bind(uri)
            serve.run(app, name=_APP, route_prefix="/", external_scaler_enabled=True)
        else:
            _scale(replicas)
        answer = _first_answer_of_another(serve.get_app_handle(_APP), seen)
        seen.add(answer["replica"])
        yield Started(time.monotonic() - began_s, answer["init_s"], answer["node"])
        time.sleep(2.0)
    serve.delete(_APP)


def _scale(replicas: int) -> None:
    from ray.serve._private.common import DeploymentID

    controller = _get_global_client()._controller
    target = DeploymentID(name="Model", app_name=_APP)
    ray.get(controller.update_deployment_replicas.remote(target, replicas), timeout=30)


def _first_answer_of_another(handle: DeploymentHandle, seen: set[str]) -> dict[str, Any]:
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        answer: dict[str, Any] = handle.remote().result(timeout_s=_TIMEOUT_S)
        if answer["replica"] not in seen:
            return answer
        time.sleep(0.005)
    raise BenchError(f"no other replica answered within {_TIMEOUT_S:g} s")


if __name__ == "__main__":
    main()
