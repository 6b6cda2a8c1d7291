"""What Ray says of the cluster: nodes, who works on them, what the autoscaler was asked for.

Read from the GCS, so that it needs neither the dashboard nor an autoscaler. Milliseconds each; a
thousand nodes take tens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weightstream.serve_integration.compaction.fleet import Labels, Resources

_SERVE = "SERVE_"
"""How the names of Serve's own actors begin: controller, proxies, replicas."""

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One living node."""

    id: str
    total: Resources
    free: Resources
    labels: Labels
    head: bool
    draining: bool


@dataclass(frozen=True, slots=True)
class Bundle:
    """One bundle of a placement group, where it is reserved."""

    node_id: str
    resources: Resources


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """The cluster at one moment."""

    nodes: tuple[NodeFacts, ...]
    asked: tuple[Resources, ...] = ()
    """All that `request_resources` wants the cluster to be large enough for."""
    foreign: Mapping[str, str] = field(default_factory=dict)
    """Node -> an actor there that is not of Serve: with zero CPUs, too, it keeps the node."""
    groups: Mapping[str, tuple[Bundle, ...]] = field(default_factory=dict)
    """Name of a placement group -> its bundles; of a replica's group, the name of its actor."""


def cluster_facts() -> ClusterFacts:
    """Read them. Needs a process that is connected to Ray."""
    import ray
    from ray._private import state
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.util import placement_group_table

    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    found = get_cluster_resource_state(gcs)
    return ClusterFacts(
        nodes=tuple(_nodes(found.node_states)),
        asked=tuple(_asked(found.cluster_resource_constraints)),
        foreign=foreign_actors(state.actors(actor_state_name="ALIVE").values()),
        groups=dict(_groups(placement_group_table().values())),
    )


def _nodes(states: Iterable[Any]) -> Iterable[NodeFacts]:
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    for one in states:
        if one.status == NodeStatus.DEAD:
            continue
        yield NodeFacts(
            one.node_id.hex(),
            dict(one.total_resources),
            dict(one.available_resources),
            dict(one.labels),
            head="node:__internal_head__" in one.total_resources,
            draining=one.status == NodeStatus.DRAINING,
        )


def _asked(constraints: Iterable[Any]) -> Iterable[Resources]:
    for constraint in constraints:
        for one in constraint.resource_requests:
            yield from [dict(one.request.resources_bundle)] * one.count


def _groups(table: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, tuple[Bundle, ...]]]:
    for group in table:
        if group["state"] != "REMOVED" and group["name"]:
            places = group["bundles_to_node_id"]
            bundles = sorted(group["bundles"].items())
            yield group["name"], tuple(Bundle(places[i], dict(one)) for i, one in bundles)


def foreign_actors(actors: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the actors (as `ray._private.state.actors` has them) that are not of Serve, by node.

    Those that a replica has started for itself end with it, and with those that they started.
    """
    rest = list(actors)
    own = {_address(one["Address"]) for one in rest if one["Name"].startswith(_SERVE)}
    while True:
        theirs = [one for one in rest if not _is_owned(one, own)]
        if len(theirs) == len(rest):
            break
        own |= {_address(one["Address"]) for one in rest if _is_owned(one, own)}
        rest = theirs
    return {one["Address"]["NodeID"]: one["Name"] or one["ActorClassName"] for one in rest}


def _is_owned(actor: Mapping[str, Any], own: set[Address]) -> bool:
    if actor["Name"].startswith(_SERVE):
        return True
    return not actor["IsDetached"] and _address(actor["OwnerAddress"]) in own


def _address(address: Mapping[str, Any]) -> Address:
    return (address["IPAddress"], int(address["Port"]))
