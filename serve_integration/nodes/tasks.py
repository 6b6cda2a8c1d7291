"""Short work on given nodes: a task of zero CPUs on each, all at once, and none waited for long."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from weightstream.errors import ClusterError, WeightstreamError

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node that Ray says is alive."""

    id: str
    host: str
    is_head: bool


@dataclass(frozen=True, slots=True)
class Outcome(Generic[_Result]):
    """What came of the work on one node: a result, or why there is none."""

    node_id: str
    result: _Result | None
    error: str = ""


def alive_nodes() -> dict[str, RayNode]:
    """Return the cluster's nodes by their id, the head first."""
    found = [
        RayNode(
            one["NodeID"], one["NodeManagerAddress"], "node:__internal_head__" in one["Resources"]
        )
        for one in ray.nodes()
        if one["Alive"]
    ]
    return {node.id: node for node in sorted(found, key=lambda one: (not one.is_head, one.id))}


def on_nodes(
    work: Callable[..., _Result], arguments: Iterable[tuple[str, tuple[Any, ...]]], limit_s: float
) -> list[Outcome[_Result]]:
    """Run `work(*arguments)` on each node; what does not end in time is given up."""
    refs = [(node_id, _submit(work, node_id, given)) for node_id, given in arguments]
    deadline_s = time.monotonic() + limit_s
    return [_outcome(node_id, ref, deadline_s, limit_s) for node_id, ref in refs]


def on_node(work: Callable[..., _Result], node_id: str, limit_s: float, *given: Any) -> _Result:
    """Run it on one node; raises `ClusterError`, which says why there is no result."""
    (outcome,) = on_nodes(work, [(node_id, given)], limit_s)
    if outcome.result is None:
        raise ClusterError(f"node {node_id[:8]}: {outcome.error}")
    return outcome.result


def _submit(work: Callable[..., Any], node_id: str, given: tuple[Any, ...]) -> Any:
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(work)
    return task.remote(*given)


def _outcome(node_id: str, ref: Any, deadline_s: float, limit_s: float) -> Outcome[Any]:
    try:
        return Outcome(node_id, ray.get(ref, timeout=max(0.0, deadline_s - time.monotonic())))
    except ray.exceptions.GetTimeoutError:
        ray.cancel(ref, force=True)
        return Outcome(node_id, None, f"no answer within {limit_s:g} s")
    except RayTaskError as error:
        return Outcome(node_id, None, _text(error.cause))
    except RayError as error:
        return Outcome(node_id, None, _text(error))


def _text(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, WeightstreamError) else f"{type(error).__name__}: {text}"
