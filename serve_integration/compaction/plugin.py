"""Engine 1: compaction inside Serve's controller.

    RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH=weightstream.serve_integration.compaction.plugin:install
    RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY=1

in the environment of the head node, before Serve starts there. Ray calls `install` before it builds
its scheduler. Where it cannot be installed it says why, once, and Ray's own compaction stays.
"""

import logging
from typing import Any

from weightstream.serve_integration.compaction.version import too_old
from weightstream.serve_integration.compaction.warming import (
    Held,
    Warm,
    held_by_agents,
    warm_by_agents,
)

log = logging.getLogger("ray.serve")

IMPORT_PATH = "weightstream.serve_integration.compaction.plugin:install"

_OVERRIDDEN: tuple[str, ...] = (
    "get_node_to_compact",
    "on_replica_stopping",
    "_best_fit_node",
    "_fail_compaction",
    "_find_best_node_to_compact",
    "_get_available_resources_per_node",
    "_pack_schedule_replica",
    "_use_pack_strategy",
)
_DELAY = "RAY_SERVE_NODE_COMPACTION_DELAY_S"


def install(warm: Warm = warm_by_agents, held: Held = held_by_agents) -> None:
    """Replace the scheduler that the controller is about to build. Never raises."""
    try:
        if why := why_not():
            log.warning("weightstream: compaction is not installed: %s", why)
            return
        _install(warm, held)
    except Exception:  # a controller that does not start would be worse than one without us
        log.exception("weightstream: compaction is not installed; Ray's own scheduler stays")


def why_not() -> str:
    """Return what this Ray, or its configuration, lacks; empty when nothing."""
    import ray

    if why := too_old():
        return why
    from ray.serve._private import constants, default_impl, deployment_scheduler, deployment_state

    scheduler = getattr(deployment_scheduler, "DeploymentScheduler", None)
    gone = [name for name in _OVERRIDDEN if not hasattr(scheduler, name)]
    gone += [_DELAY] if not hasattr(deployment_state, _DELAY) else []
    create = "create_deployment_scheduler"
    gone += [create] if not hasattr(default_impl, create) else []
    if gone:
        return f"Ray {ray.__version__} has no {', '.join(gone)} any more"
    if not constants.RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY:
        return "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY=1 is not set for the controller"
    return ""


def _install(warm: Warm, held: Held) -> None:
    from ray.serve._private import default_impl, deployment_state
    from ray.serve._private.utils import get_head_node_id

    from weightstream.serve_integration.compaction.desk import Desk
    from weightstream.serve_integration.compaction.facts import cluster_facts
    from weightstream.serve_integration.compaction.pilot import Pilot
    from weightstream.serve_integration.compaction.scheduler import CompactingScheduler

    rays = default_impl.create_deployment_scheduler
    delay_s = float(getattr(deployment_state, _DELAY))

    def create(cache: Any, head_node_id: str | None = None, create_group: Any = None) -> Any:
        try:
            desk = Desk(held)
            scheduler = CompactingScheduler(
                cache,
                head_node_id or get_head_node_id(),
                create_placement_group_fn=create_group
                or default_impl._default_create_placement_group,
                pilot=Pilot(desk, cluster_facts, warm, delay_s),
            )
            desk.open()
        except Exception:
            log.exception("weightstream: compaction is not installed; Ray's own scheduler stays")
            setattr(deployment_state, _DELAY, delay_s)
            return rays(cache, head_node_id, create_group)
        return scheduler

    default_impl.create_deployment_scheduler = create
    setattr(deployment_state, _DELAY, 0.0)  # the pilot waits, for as long as it is tuned to
    log.info("weightstream: compaction is installed (Ray would wait for %g s)", delay_s)
