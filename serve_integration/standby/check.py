"""What nodes and deployments lack to gain from process standby, and what waiting costs.

Two things must hold, or a replica starts as slowly as ever: its node's raylet was started with the
modules to import ahead (`RAY_preload_python_modules`), and its deployment has no runtime
environment, because Ray gives a process to those alone whose environment it was started with.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from weightstream.errors import ClusterError

VARIABLE = "RAY_preload_python_modules"
MODULES = ("torch", "ray.serve._private.replica", "aiohttp", "fastapi")
"""Serve's replica module and the two that it imports late are 0.55 s of a start, torch 1.1 s."""
_PROBE_S = 60.0
_ASK_S = 10.0


@dataclass(frozen=True, slots=True)
class Probe:
    """What a fresh worker process of a node is like."""

    node_id: str
    missing: tuple[str, ...]
    """The modules that it has not imported by itself."""
    resident_bytes: int
    private_bytes: int
    """What one more such process costs: pages that it shares with no other."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """A deployment whose replicas start a process of their own, and why."""

    app: str
    deployment: str
    why: str


def probe(node_ids: Sequence[str]) -> list[Probe]:
    """Look at one worker process on each node; it ends afterwards, so it is one less that waits.

    Raises ClusterError when a node does not answer in a minute.
    """
    # One call per process: one that stayed would belong to this job and be of use to nobody.
    task: Any = ray.remote(num_cpus=0, max_calls=1, max_retries=0)(_look)
    asked = {node_id: task.options(**_on(node_id)).remote(MODULES) for node_id in node_ids}
    try:
        answers = ray.get(list(asked.values()), timeout=_PROBE_S)
    except ray.exceptions.RayError as error:
        raise ClusterError(f"a node did not show its processes: {_line(error)}") from error
    return [Probe(node_id, *answer) for node_id, answer in zip(asked, answers, strict=True)]


def start_lines() -> list[str]:
    """Return how to start Ray, on the head and elsewhere, so that processes import ahead."""
    variable = f"{VARIABLE}={','.join(MODULES)}"
    return [f"{variable} ray start --head ...", f"{variable} ray start --address=HEAD:6379 ..."]


@dataclass(frozen=True, slots=True)
class Deployments:
    """How many deployments there are, and which of them cannot use a process that waits."""

    count: int = 0
    fresh: tuple[Fresh, ...] = ()

    @property
    def all_fresh(self) -> bool:
        """Say whether there are some, and none of them gains: then nothing should wait."""
        return 0 < self.count == len(self.fresh)


def deployments() -> Deployments:
    """Return what Serve runs; nothing where Serve is off."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return Deployments()
    try:
        details = ray.get(client._controller.get_serve_instance_details.remote(), timeout=_ASK_S)
    except ray.exceptions.RayError as error:
        text = f"Serve's controller does not answer: {_line(error)}"
        raise ClusterError(text, transient=True) from error
    return sort_out(details)


def sort_out(details: Mapping[str, Any]) -> Deployments:
    """Sort out the deployments with a runtime environment, from what Serve says of itself."""
    found = [
        (app, name, deployment["deployment_config"].get("ray_actor_options") or {})
        for app, application in details["applications"].items()
        for name, deployment in application["deployments"].items()
    ]
    fresh = [
        Fresh(app, name, f"runtime_env: {', '.join(sorted(environment))}")
        for app, name, options in found
        if (environment := options.get("runtime_env"))
    ]
    return Deployments(len(found), tuple(fresh))


def _on(node_id: str) -> dict[str, Any]:
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def _look(modules: Sequence[str]) -> tuple[tuple[str, ...], int, int]:
    missing = tuple(name for name in modules if name not in sys.modules)
    import psutil  # type: ignore[import-untyped]

    memory = psutil.Process(os.getpid()).memory_full_info()
    return missing, memory.rss, memory.uss


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
