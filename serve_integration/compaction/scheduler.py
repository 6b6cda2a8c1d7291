"""Serve's scheduler with another choice of the node to compact. Imported in the controller only.

Ray's state machine stays: a replacement before the old replica goes, at least as many running as
wanted, cancelled when something does not fit. Replaced are which node is emptied and when, and
where its replicas go; added are an end for replacements that never start, and for the wait for an
autoscaler that never comes. Every override falls back to Ray's own behaviour, and says so.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.deployment_scheduler import DeploymentScheduler

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction.fleet import Fleet, Reserve, Workload
from weightstream.serve_integration.compaction.observe import Placed, View, fleet_of
from weightstream.serve_integration.compaction.pilot import Look, Pilot
from weightstream.serve_integration.compaction.serving import Needs, workload_of

log = logging.getLogger("ray.serve")

_T = TypeVar("_T")

_FAILED_STARTS = 2
"""Replacements that may end before they run: one may be bad luck."""
_COMPLAIN_EVERY_S = 60.0
_RAYS_REASON = "Ray gave up, and said why in the controller's log"
_UNREST = "replicas start, stop or move, or nodes drain"


@dataclass(slots=True)
class _Complaints:
    """Logs errors, each kind once a minute: the loop runs ten times a second."""

    at_s: dict[str, float] = field(default_factory=dict)

    def make(self, what: str, error: Exception) -> None:
        key = f"{what} {type(error).__name__}"
        if time.monotonic() - self.at_s.get(key, -_COMPLAIN_EVERY_S) >= _COMPLAIN_EVERY_S:
            self.at_s[key] = time.monotonic()
            log.error(
                "weightstream: compaction failed while %s; Ray's own behaviour holds", what,
                exc_info=error,
            )  # fmt: skip


class CompactingScheduler(DeploymentScheduler):  # type: ignore[misc]
    """See the module's docstring."""

    _compacting_node: Any  # Ray's; None while no node is emptied

    def __init__(self, *args: Any, pilot: Pilot, **more: Any) -> None:
        super().__init__(*args, **more)
        self._pilot = pilot
        self._complaints = _Complaints()
        self._stable_since: float | None = None
        self._failed_starts = 0
        self._why_cancelled = ""
        self._placing: DeploymentID | None = None

    def _or_ray(self, what: str, ours: Callable[[], _T], rays: Callable[[], _T]) -> _T:
        try:
            return ours()
        except Exception as error:  # nothing of ours may keep Serve from running
            self._complaints.make(what, error)
            return rays()

    # When.

    def get_node_to_compact(self, allow_new_compaction: bool) -> tuple[str, float] | None:
        """Return the node to empty, now and until it is empty."""
        now = time.time()
        if not allow_new_compaction:
            self._stable_since = None
        elif self._stable_since is None:
            self._stable_since = now
        before, succeeded = self._compacting_node, self._num_succeeded_compactions
        allowed = self._or_ray(
            "waiting for its time",
            lambda: self._may_begin(now, allow_new_compaction),
            lambda: self._ray_may_begin(now),
        )
        found: tuple[str, float] | None = super().get_node_to_compact(allowed)
        self._or_ray(
            "watching a move",
            lambda: self._watch(now, before, self._num_succeeded_compactions > succeeded),
            lambda: None,
        )
        return found

    def _ray_may_begin(self, now: float) -> bool:
        """Say what Ray would, whose own delay `install` has put out of force."""
        since = self._stable_since
        return since is not None and now - since > self._pilot.ray_stable_s

    def _may_begin(self, now: float, stable: bool) -> bool:
        if self._compacting_node is not None:
            return False
        if not self._use_pack_strategy():
            name = next(
                _name(one) for one, info in self._deployments.items()
                if info.is_non_strict_pack_pg()
            )  # fmt: skip
            self._pilot.blocked(f"{name} has a placement group that is not STRICT_PACK")
            return False
        self._pilot.desk.deployments = tuple(
            registry.Deployment(one.app_name, one.name) for one in self._deployments
        )
        if self._pilot.desk.hurried:
            self._next_allowed_compaction_timestamp_s = 0  # Ray's own back-off
        return self._pilot.may_begin(now, "" if stable else _UNREST, self._counts())

    def _counts(self) -> dict[str, int]:
        return {
            _name(one): len(self._running_replicas[one])
            + len(self._launching_replicas[one])
            + len(self._pending_replicas[one])
            for one in self._deployments
        }

    def _watch(self, now: float, before: Any, succeeded: bool) -> None:
        """End a move that gets nowhere, or whose node nobody takes; tell the pilot how it went."""
        info = self._compacting_node
        if info is None:
            if self._pilot.is_waiting_for_answer:
                self._next_compaction_scan_timestamp_s = 0
            if succeeded:
                self._pilot.succeeded(now)
            elif before is not None and self._pilot.plan is not None:
                self._pilot.dropped()
            return
        tuning = self._pilot.desk.tuning
        if before is None:
            self._failed_starts = 0
        if info.migration_done_timestamp_s is not None:
            self._release(now, now - info.migration_done_timestamp_s >= tuning.release_s)
        elif self._failed_starts >= _FAILED_STARTS:
            self._cancel(f"{self._failed_starts} replacements ended before they ran")
        elif now - info.start_timestamp_s >= tuning.move_s:
            self._cancel(f"not empty after {tuning.move_s:g} s")

    def _release(self, now: float, is_late: bool) -> None:
        if not is_late:
            self._pilot.releasing()
            return
        log.info(
            "weightstream: node %s is empty and nobody takes it; it may take replicas again",
            self._compacting_node.target_node_id,
        )
        self._compacting_node = None
        self._num_consecutive_failed_compactions = 0
        self._next_allowed_compaction_timestamp_s = 0
        self._pilot.succeeded(now)

    def _cancel(self, why: str) -> None:
        log.warning(
            "weightstream: cancelled emptying node %s: %s; its replicas stay",
            self._compacting_node.target_node_id, why,
        )  # fmt: skip
        self._why_cancelled = why
        self._fail_compaction()

    def _fail_compaction(self) -> None:
        super()._fail_compaction()
        why, self._why_cancelled = self._why_cancelled or _RAYS_REASON, ""
        text = f"cancelled, the replicas stay: {why}"
        self._or_ray("backing off", lambda: self._pilot.failed(time.time(), text), lambda: None)

    def on_replica_stopping(self, replica_id: ReplicaID) -> None:
        """Count replacements that end before they ran."""
        launching = self._launching_replicas.get(replica_id.deployment_id, {})
        if self._compacting_node is not None and replica_id in launching:
            self._failed_starts += 1
        super().on_replica_stopping(replica_id)

    # Which.

    def _find_best_node_to_compact(self) -> str | None:
        return self._or_ray(
            "choosing a node", lambda: self._pilot.choose(self._fleet), self._ray_choice
        )

    def _ray_choice(self) -> str | None:
        if not self._ray_may_begin(time.time()):
            return None
        found: str | None = super()._find_best_node_to_compact()
        return found

    def _fleet(self, look: Look) -> Fleet:
        workloads = {one: self._workload(one) for one in self._deployments}
        missing = self._pilot.missing()
        placed = [
            Placed(one.unique_id, workloads[one.deployment_id], node_id, one.to_full_id_str())
            for replicas in self._running_replicas.values()
            for one, node_id in replicas.items()
        ]
        view = View(
            look.holds,
            self._pilot.desk.tuning.prices,
            tuple(
                Reserve("as many ran lately", one, missing[one.name])
                for one in workloads.values()
                if one.name in missing
            ),
            self._get_available_resources_per_node(),
        )
        return fleet_of(look.facts, placed, view)

    def _workload(self, deployment_id: DeploymentID) -> Workload:
        info = self._deployments[deployment_id]
        needs = Needs(
            {kind: amount for kind, amount in (info.actor_resources or {}).items() if amount},
            info.placement_group_bundles or (),
            info.placement_group_strategy or "PACK",
            info.label_selector,
            info.bundle_label_selector or (),
            [one.get("label_selector") or {} for one in info.fallback_strategy or ()],
            info.max_replicas_per_node,
            info.is_gang,
            info.pins_replicas,
        )
        name = _name(deployment_id)
        return workload_of(name, needs, self._pilot.desk.weights.get(name, ()))

    # Where.

    def _pack_schedule_replica(self, scheduling_request: Any, *args: Any, **more: Any) -> Any:
        self._placing = deployment_id = scheduling_request.replica_id.deployment_id
        try:
            node_id = super()._pack_schedule_replica(scheduling_request, *args, **more)
        finally:
            self._placing = None
        self._pilot.placed(_name(deployment_id), node_id)
        return node_id

    def _best_fit_node(
        self, required_resources: Any, available_resources: Mapping[str, Any], *args: Any,
        **more: Any,
    ) -> str | None:  # fmt: skip
        def among(nodes: Mapping[str, Any]) -> str | None:
            found: str | None = super(CompactingScheduler, self)._best_fit_node(
                required_resources, nodes, *args, **more
            )
            return found

        if self._placing is None:
            return among(available_resources)
        name = _name(self._placing)
        return self._or_ray(
            "placing a replica",
            lambda: self._preferred(name, required_resources, available_resources, among),
            lambda: among(available_resources),
        )

    def _preferred(
        self, name: str, required: Any, available: Mapping[str, Any],
        among: Callable[[Mapping[str, Any]], str | None],
    ) -> str | None:  # fmt: skip
        """Return the plan's node, else the best fit that holds the weights, else the best fit."""

        def offered(node_id: str) -> bool:
            return node_id in available and available[node_id].can_fit(required)

        if planned := self._pilot.destination(name, offered):
            return planned
        desk = self._pilot.desk
        uris = [one.uri for one in desk.weights.get(name, ())]
        warm = {
            node_id: room for node_id, room in available.items()
            if uris and all(desk.holds.get(node_id, {}).get(uri) for uri in uris)
        }  # fmt: skip
        return (among(warm) if warm else None) or among(available)


def _name(deployment_id: DeploymentID) -> str:
    return f"{deployment_id.app_name}/{deployment_id.name}"
