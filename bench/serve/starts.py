"""Time a torch replica from the decision to RUNNING, with and without a process that waits.

    python -m weightstream.bench.serve.starts [--samples 5]

One cluster on this machine with two worker nodes: one as Ray starts it by itself, one that imports
ahead and on which a process waits. A replica is started on each in turn and stopped again, so both
see the same machine. No weights are loaded: the replica imports torch and makes a tensor.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client

from weightstream.bench.errors import BenchError
from weightstream.serve_integration.standby.check import MODULES, VARIABLE
from weightstream.serve_integration.standby.processes import Keeper
from weightstream.serve_integration.standby.raylets import Node, Raylets

_APP = "starts"
_TIMEOUT_S = 120.0
_SETTLE_S = 6.0  # until a process that waits has imported torch, on two cores
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Model:
    """A replica that needs torch."""

    def __init__(self) -> None:
        import torch

        self.sum = float(torch.ones(8).sum())

    def __call__(self) -> float:
        """Return what torch made."""
        return self.sum


class Group:
    """The parent of both deployments, so that one application has them."""

    def __init__(self, *_: object) -> None:
        pass


def main() -> None:
    """Print every sample and both medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=5)
    samples = parser.parse_args().samples
    taken: dict[str, list[float]] = {"fresh": [], "waiting": []}
    with _cluster(), Keeper(1, raylets=_Waiting()) as keeper:
        _deploy()
        for _ in range(samples):
            for kind, seconds in taken.items():
                _fill(keeper)
                seconds.append(_start_and_stop(kind))
                print(f"{kind:8} {seconds[-1]:6.2f} s", flush=True)
    for kind, seconds in taken.items():
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{kind:8} median {statistics.median(seconds):.2f} s  ({spread}, {samples} samples)")


@contextmanager
def _cluster() -> Iterator[None]:
    os.environ.update(_ENVIRONMENT)
    cluster = Cluster(initialize_head=False, shutdown_at_exit=True)
    none: dict[str, str] = {}
    ahead = {VARIABLE: ",".join(MODULES)}
    try:
        for name, cpus, more in (("head", 0, none), ("fresh", 4, none), ("waiting", 4, ahead)):
            cluster.add_node(
                num_cpus=cpus,
                resources={name: 100},
                env_vars=_ENVIRONMENT | more,
                object_store_memory=100 << 20,
                include_dashboard=False,
            )
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"port": 0})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


class _Waiting(Raylets):
    """Only the node on which processes shall wait."""

    def nodes(self) -> list[Node]:
        """Return that node."""
        wanted = {one["NodeID"] for one in ray.nodes() if "waiting" in one["Resources"]}
        return [node for node in super().nodes() if node.id in wanted]


def _fill(keeper: Keeper) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while any(one.idle < 1 for one in keeper.refill()):
        if time.monotonic() > deadline:
            raise BenchError(f"no process waits within {_TIMEOUT_S:g} s")
        time.sleep(0.1)
    time.sleep(_SETTLE_S)


def _deploy() -> None:
    bound = [
        serve.deployment(
            name=kind,
            ray_actor_options={"num_cpus": 0.1, "resources": {kind: 1}},
            graceful_shutdown_timeout_s=1,
            graceful_shutdown_wait_loop_s=0.1,
        )(Model).bind()
        for kind in ("fresh", "waiting")
    ]
    parent = serve.deployment(name="Group", ray_actor_options={"num_cpus": 0.1})(Group)
    app = parent.bind(*bound)
    serve.run(app, name=_APP, route_prefix=None, external_scaler_enabled=True)


def _start_and_stop(kind: str) -> float:
    """Scale one deployment to two and back; return how long the second took to run."""
    began_s = time.monotonic()
    _scale(kind, 2)
    _await(kind, 2)
    took_s = time.monotonic() - began_s
    _scale(kind, 1)
    _await(kind, 1)
    return took_s


def _scale(kind: str, replicas: int) -> None:
    controller = _get_global_client()._controller
    target = DeploymentID(name=kind, app_name=_APP)
    ray.get(controller.update_deployment_replicas.remote(target, replicas), timeout=_TIMEOUT_S)


def _await(kind: str, replicas: int) -> None:
    controller = _get_global_client()._controller
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        details = ray.get(controller.get_serve_instance_details.remote(), timeout=_TIMEOUT_S)
        found = details["applications"][_APP]["deployments"][kind]["replicas"]
        if len(found) == replicas and all("RUNNING" in str(one["state"]) for one in found):
            return
        time.sleep(0.01)
    raise BenchError(f"{kind} has no {replicas} replicas within {_TIMEOUT_S:g} s")


if __name__ == "__main__":
    main()
