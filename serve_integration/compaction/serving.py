"""What Serve says of its deployments, as workloads; the same for both engines."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightstream.errors import ClusterError
from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction.fleet import Labels, Model, Resources, Workload
from weightstream.serve_integration.compaction.observe import Placed

_ASK_S = 10.0


@dataclass(frozen=True, slots=True)
class Needs:
    """A deployment's options that say where its replicas may be."""

    actor: Resources
    bundles: Sequence[Resources] = ()
    strategy: str = "PACK"
    selector: Labels | None = None
    bundle_selectors: Sequence[Labels] = ()
    fallbacks: Sequence[Labels] = ()
    max_per_node: int | None = None
    is_gang: bool = False
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """What runs, and why the fleet is not at rest; empty when it is."""

    placed: tuple[Placed, ...]
    unrest: str
    workloads: Mapping[str, Workload]
    """Of every deployment, by name; also of those without replicas."""
    counts: Mapping[str, int]
    """Replicas of each workload."""


def workload_of(name: str, needs: Needs, models: Iterable[registry.Weights]) -> Workload:
    """Return a deployment's needs in the planner's words."""
    selectors = _alternatives(needs)
    fixed = ""
    if needs.is_gang:
        fixed = "its replicas are a gang, which moves as one"
    elif needs.is_pinned:
        fixed = "its replicas follow the proxies"
    elif selectors is None:
        fixed = "its bundles ask for different labels"
    return Workload(
        name,
        tuple(dict(one) for one in needs.bundles) or (dict(needs.actor),),
        (needs.strategy or "PACK") if needs.bundles else "STRICT_PACK",  # type: ignore[arg-type]
        selectors or (),
        needs.max_per_node or None,
        tuple(Model(one.uri, one.size_bytes) for one in models),
        fixed,
    )


def _alternatives(needs: Needs) -> tuple[Labels, ...] | None:
    """Return the selectors of which one has to match; None when bundles contradict each other."""
    if needs.bundles:
        merged: dict[str, str] = {}
        for selector in needs.bundle_selectors:
            if any(merged.get(key, value) != value for key, value in selector.items()):
                return None
            merged.update(selector)
        return (merged,) if merged else ()
    if not needs.selector:
        return ()
    return (dict(needs.selector), *(dict(one) for one in needs.fallbacks))


def served() -> Served:
    """Ask Serve's controller; raises `ClusterError` when it does not run or answer."""
    import ray
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        raise ClusterError("Serve does not run on this cluster: there is nothing to compact")
    try:
        details = ray.get(client._controller.get_serve_instance_details.remote(), timeout=_ASK_S)
    except ray.exceptions.RayError as error:
        cause = str(error).strip().partition("\n")[0]
        raise ClusterError(
            f"Serve's controller does not answer: {cause}", transient=True
        ) from error
    return served_of(details, registry.weights_of)


def served_of(
    details: Mapping[str, Any],
    weights_of: Callable[[registry.Deployment], Iterable[registry.Weights]],
) -> Served:
    """Return what the controller's details say."""
    found = {
        registry.Deployment(app, name): one
        for app, application in details["applications"].items()
        for name, one in application["deployments"].items()
    }
    workloads = {
        one: workload_of(
            f"{one.app}/{one.name}",
            _needs(about["deployment_config"], about["required_resources"]),
            weights_of(one),
        )
        for one, about in found.items()
    }
    return Served(
        tuple(p for one, about in found.items() for p in _placed(workloads[one], about)),
        next((why for one, about in found.items() if (why := _unrest(one, about))), ""),
        {one.name: one for one in workloads.values()},
        {f"{one.app}/{one.name}": len(about["replicas"]) for one, about in found.items()},
    )


def _placed(workload: Workload, found: Mapping[str, Any]) -> Iterator[Placed]:
    for one in found["replicas"]:
        if one.get("node_id"):
            yield Placed(one["replica_id"], workload, one["node_id"], one.get("actor_name") or "")


def _needs(config: Mapping[str, Any], required: Resources) -> Needs:
    options = config.get("ray_actor_options") or {}
    return Needs(
        {kind: amount for kind, amount in required.items() if amount},
        config.get("placement_group_bundles") or (),
        config.get("placement_group_strategy") or "PACK",
        options.get("label_selector"),
        config.get("placement_group_bundle_label_selector") or (),
        [one.get("label_selector") or {} for one in options.get("fallback_strategy") or ()],
        config.get("max_replicas_per_node"),
        is_gang=bool(config.get("gang_scheduling_config")),
    )


def _unrest(deployment: registry.Deployment, found: Mapping[str, Any]) -> str:
    """Say why a deployment is not at rest: any replica that does not run, or is one too many."""
    name = f"{deployment.app}/{deployment.name}"
    running = [one for one in found["replicas"] if _state(one["state"]) == "RUNNING"]
    target = int(found["target_num_replicas"])
    if len(running) == len(found["replicas"]) == target:
        return (
            "" if _state(found["status"]) == "HEALTHY" else f"{name} is {_state(found['status'])}"
        )
    return f"{name}: {len(running)} of {len(found['replicas'])} replicas run, {target} wanted"


def _state(value: object) -> str:
    return str(value).rpartition(".")[2]
