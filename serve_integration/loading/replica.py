"""Where this process stands: which replica of which deployment it is, and since when."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WAITED_S = 5.0
"""A process that is older than its actor by more than this stood by, and did not start for it."""


@dataclass(frozen=True, slots=True)
class Replica:
    """A Serve replica by its names."""

    app: str
    deployment: str
    id: str
    node_id: str


def this_replica() -> Replica | None:
    """Return the replica that this process is; None outside of Serve."""
    context = _context()
    if context is None:
        return None
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    return Replica(context.app_name, context.deployment, context.replica_tag, node_id)


def is_constructed() -> bool:
    """Say whether the deployment's constructor has returned; True outside of Serve."""
    context = _context()
    return context is None or context.servable_object is not None


def answers_a_request() -> bool:
    """Say whether the caller works for a request, and not for Serve itself."""
    from ray.serve.context import _get_serve_request_context

    return bool(_get_serve_request_context().request_id)


def process_began_at() -> float:
    """Return the Unix time at which this process began."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    since_boot_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s)


def replica_began_at() -> float:
    """Return when the replica's start began, by the clock of this node; asks the GCS.

    That is when its process began; in a process that stood by, when its actor was put there.
    """
    began_at, actor_at = process_began_at(), _actor_at()
    stood_by = actor_at is not None and actor_at - began_at > _WAITED_S
    return actor_at if actor_at is not None and stood_by else began_at


def _actor_at() -> float | None:
    import ray
    from ray._private.state import actors

    actor_id = ray.get_runtime_context().get_actor_id()
    start_ms = actors(actor_id).get("StartTime") if actor_id else None
    return start_ms / 1000 if start_ms else None


def _context() -> Any:
    if "ray.serve" not in sys.modules:
        return None
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_replica_context()
    except RayServeException:
        return None
