"""The fleet as seen from outside of Serve's controller, and who could compact it."""

from collections.abc import Mapping
from dataclasses import dataclass

from weightstream.errors import ClusterError
from weightstream.serve_integration.compaction import facts, ledger, planner, serving, tuning
from weightstream.serve_integration.compaction.facts import ClusterFacts
from weightstream.serve_integration.compaction.fleet import Fleet, Reserve
from weightstream.serve_integration.compaction.ledger import State
from weightstream.serve_integration.compaction.observe import View, fleet_of
from weightstream.serve_integration.compaction.planner import Outlook
from weightstream.serve_integration.compaction.serving import Served
from weightstream.serve_integration.compaction.tuning import Tuning
from weightstream.serve_integration.compaction.version import too_old
from weightstream.serve_integration.compaction.warming import Held, held_by_agents

NO_PLUGIN = "the plug-in does not run in Serve's controller"


@dataclass(frozen=True, slots=True)
class Survey:
    """What a dry run finds."""

    fleet: Fleet
    outlook: Outlook
    unrest: str
    """Why nothing would be moved just now; empty when the fleet is at rest."""
    state: State | None
    """What the plug-in in the controller thinks."""
    why_drain: str
    """Why nodes would have to be drained from outside; empty when the plug-in compacts."""
    lease_holder: str
    """Who drains nodes now; empty when nobody does."""


def survey(held: Held = held_by_agents) -> Survey:
    """Look at the cluster and move nothing; raises `ClusterError` when it cannot be compacted."""
    if why := too_old():
        raise ClusterError(f"compaction does not work here: {why}")
    served, state, tuned = serving.served(), ledger.read_state(), tuning.read()
    why_drain = why_not_in_controller(served, state)
    missing = state.missing if state is not None else {}
    fleet = fleet_from(served, facts.cluster_facts(), held(uris_of(served)), missing, tuned)
    return Survey(
        fleet,
        planner.outlook(fleet, tuned.limits(placed_by_ray=bool(why_drain))),
        served.unrest,
        state,
        why_drain,
        ledger.lease_holder(),
    )


def fleet_from(
    served: Served,
    found: ClusterFacts,
    holds: Mapping[str, Mapping[str, int]],
    missing: Mapping[str, int],
    tuned: Tuning,
) -> Fleet:
    """Return the fleet, with room wanted for replicas that are `missing`, by workload."""
    reserves = tuple(
        Reserve("as many ran lately", served.workloads[name], count)
        for name, count in missing.items()
        if name in served.workloads
    )
    return fleet_of(found, served.placed, View(holds, tuned.prices, reserves))


def uris_of(served: Served) -> tuple[str, ...]:
    """Return every model that any deployment loads."""
    return tuple(sorted({m.uri for one in served.workloads.values() for m in one.models}))


def why_not_in_controller(served: Served, state: State | None) -> str:
    """Say why the plug-in in the controller does not compact; empty when it does."""
    if state is None:
        return NO_PLUGIN
    for workload in served.workloads.values():
        if workload.strategy != "STRICT_PACK":
            return f"{workload.name} has a placement group that is not STRICT_PACK"
    return ""
