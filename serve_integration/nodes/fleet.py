"""What Ray and Serve say of the cluster now: rooms on nodes, replicas and where they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from weightstream.errors import ClusterError, UsageError
from weightstream.serve_integration.registry import Deployment

_ASK_S = 10.0
_USABLE = ("RUNNING", "IDLE")


@dataclass(frozen=True, slots=True)
class ServedDeployment:
    """A deployment with its replicas' nodes; those that have none yet are left out."""

    deployment: Deployment
    target: int
    needs: Mapping[str, float] = field(default_factory=dict)
    """Resources of one replica, its placement group's bundles together."""
    most_per_node: int = 0
    replica_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node has free, and what Ray says it does."""

    id: str
    status: str
    """`RUNNING`, `IDLE`, `DRAINING`; the dead are left out."""
    is_head: bool
    available: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """Say whether Ray would still put something there."""
        return self.status in _USABLE


def node_states() -> dict[str, NodeState]:
    """Return the state of every node that lives; needs neither the dashboard nor an autoscaler."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    address = ray.get_runtime_context().gcs_address
    found = get_cluster_resource_state(GcsClient(address=address))
    states = (
        NodeState(
            one.node_id.hex(),
            NodeStatus.Name(one.status),
            "node:__internal_head__" in one.total_resources,
            dict(one.available_resources),
        )
        for one in found.node_states
    )
    return {one.id: one for one in states if one.status != "DEAD"}


def served() -> tuple[ServedDeployment, ...]:
    """Return what Serve runs; nothing where it does not run. Not from the controller's own loop."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return ()
    try:
        details = ray.get(client._controller.get_serve_instance_details.remote(), timeout=_ASK_S)
    except ray.exceptions.RayError as error:
        raise ClusterError(f"Serve's controller does not answer: {error}") from error
    return tuple(
        _served(app, name, found)
        for app, application in details["applications"].items()
        for name, found in application["deployments"].items()
    )


def served_as(deployment: Deployment) -> ServedDeployment:
    """Return one deployment; raises `UsageError` when Serve does not know it."""
    for one in served():
        if one.deployment == deployment:
            return one
    raise UsageError(f"Serve runs no deployment {deployment.name!r} in {deployment.app!r}")


def _served(app: str, name: str, found: Mapping[str, Any]) -> ServedDeployment:
    config = found["deployment_config"]
    bundles = config.get("placement_group_bundles") or ()
    needs = _sum(bundles) if bundles else found["required_resources"]
    return ServedDeployment(
        Deployment(app, name),
        int(found["target_num_replicas"]),
        {key: float(value) for key, value in needs.items()},
        int(config.get("max_replicas_per_node") or 0),
        tuple(one["node_id"] for one in found["replicas"] if one.get("node_id")),
    )


def _sum(bundles: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for bundle in bundles:
        for name, count in bundle.items():
            total[name] = total.get(name, 0.0) + count
    return total
