"""Engine 2: empties nodes from outside, by Ray's own drain.

For fleets that the controller does not pack: with a placement group other than STRICT_PACK anywhere
in them, or without the plug-in. Serve sees the drain and starts replacements first, wherever Ray
puts them; the node's raylet ends by itself once nothing is left there. A drain cannot be taken back
(Ray has no call for it), so a node is drained only when its replicas fit both packed and spread.
One at a time, under the lease.
"""

import time
from dataclasses import dataclass, field

from weightstream.errors import ClusterError
from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import facts, serving, survey, tuning
from weightstream.serve_integration.compaction.desk import Desk
from weightstream.serve_integration.compaction.fleet import Fleet
from weightstream.serve_integration.compaction.ledger import Lease, State
from weightstream.serve_integration.compaction.pilot import Look, Pilot
from weightstream.serve_integration.compaction.serving import Served
from weightstream.serve_integration.compaction.version import too_old
from weightstream.serve_integration.compaction.warming import (
    Held,
    Warm,
    held_by_agents,
    warm_by_agents,
)
from weightstream.serve_integration.nodes.fleet import node_states

_STABLE_S = 300.0
"""What Ray's own compaction waits by default; the controller's environment is not seen here."""
_NO_DEADLINE = 0
"""Past a deadline Serve stops old replicas without waiting for their replacements."""


@dataclass(slots=True)
class Drainer:
    """Drains one node after the other; whoever calls `turn` has to hold the lease."""

    lease: Lease
    hurried: bool = False
    """Skip the waits, except for a fleet that changes."""
    warm: Warm = warm_by_agents
    held: Held = held_by_agents
    served: Served | None = None
    """What ran at the last look."""
    _pilot: Pilot = field(init=False)
    _began: float = 0.0
    """Unix time at which the node began to drain."""

    def __post_init__(self) -> None:
        if why := too_old():
            raise ClusterError(f"nodes cannot be drained here: {why}")
        desk = Desk(self.held, hurried=self.hurried)
        self._pilot = Pilot(desk, facts.cluster_facts, self.warm, _STABLE_S, placed_by_ray=True)

    @property
    def is_draining(self) -> bool:
        """Say whether a node is on its way out."""
        return self._pilot.plan is not None

    def turn(self) -> State:
        """Do what there is to do now, and return what is thought; to be called about once a second.

        Raises `ClusterError` when the lease is lost; a transient one when the cluster does not
        answer.
        """
        self.lease.renew()
        self._pilot.desk.tuning = tuning.read()
        if self.is_draining:
            self._watch(time.time())
        else:
            self._look(time.time())
        return self._pilot.desk.state or State("waiting", "looking at the nodes")

    def _look(self, now: float) -> None:
        self.served = served = serving.served()
        self._pilot.desk.weights = {
            name: tuple(registry.Weights(model.uri, model.size_bytes) for model in one.models)
            for name, one in served.workloads.items()
        }
        unrest = served.unrest or _draining()
        if not self._pilot.may_begin(now, unrest, served.counts):
            return
        if node_id := self._choose(served):
            self._drain(now, node_id)

    def _choose(self, served: Served) -> str | None:
        import ray

        pilot = self._pilot

        def fleet_of(look: Look) -> Fleet:
            return survey.fleet_from(
                served, look.facts, look.holds, pilot.missing(), pilot.desk.tuning
            )

        try:
            return pilot.choose(fleet_of)
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise ClusterError(f"Ray does not answer: {error}", transient=True) from error

    def _drain(self, now: float, node_id: str) -> None:
        self.lease.renew()  # a look takes a while: nobody may have taken over meanwhile
        self._began = now
        if refusal := drain(node_id):
            self._pilot.failed(now, f"Ray does not drain node {node_id}: {refusal}")

    def _watch(self, now: float) -> None:
        plan, limit_s = self._pilot.plan, self._pilot.desk.tuning.move_s
        if plan is None:
            return
        if plan.node_id not in node_states():
            self._pilot.succeeded(now)
        elif now - self._began >= limit_s:
            text = f"node {plan.node_id} is not empty after {limit_s:g} s; what runs there stays, "
            self._pilot.failed(now, text + "and it takes nothing new: a drain cannot be undone")


def drain(node_id: str) -> str:
    """Have Ray drain a node for good; return why it refuses, empty when it does not."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION  # the other one is for idle nodes
    accepted, why = gcs.drain_node(node_id, reason, "weightstream: compaction", _NO_DEADLINE)
    return "" if accepted else why or "for no reason that it gives"


def _draining() -> str:
    """Say which node is on its way out; empty when none is."""
    found = sorted(one.id for one in node_states().values() if one.status == "DRAINING")
    return f"node {found[0]} drains" if found else ""
