"""The plug-in's course, from a fleet at rest to a node that Ray may empty.

    waiting   until the fleet has stood still, and no cooldown or back-off runs
    warming   the destinations, once it has looked at the nodes, their foreign actors and what they
              hold, and the planner has chosen; then it looks again, and must choose the same
    moving    Ray does, and is watched
    releasing Ray has moved all; new replicas keep off until somebody takes the node, or nobody did
    settled   it has looked, and no node can be emptied

Nothing here blocks, and nothing here knows of Ray: the scheduler calls it on every loop, and so
does the drain engine.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from weightstream.serve_integration.compaction import planner
from weightstream.serve_integration.compaction.desk import Desk, uris_of
from weightstream.serve_integration.compaction.facts import ClusterFacts
from weightstream.serve_integration.compaction.fleet import Fleet, Plan
from weightstream.serve_integration.compaction.guard import Guard, Pace, Peaks
from weightstream.serve_integration.compaction.ledger import State, rows_of
from weightstream.serve_integration.compaction.planner import Verdict
from weightstream.serve_integration.compaction.warming import Errand, Warm, wanted_by

log = logging.getLogger("ray.serve")

_LOOK_S = 15.0


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of the cluster."""

    facts: ClusterFacts
    holds: Mapping[str, Mapping[str, int]]


@dataclass(slots=True)
class Pilot:
    """Decides when to ask the planner, and what happens before its answer is followed."""

    desk: Desk
    facts: Callable[[], ClusterFacts]
    warm: Warm
    ray_stable_s: float
    placed_by_ray: bool = False
    """Whether Ray will choose the destinations."""
    plan: Plan | None = None
    """That Ray follows at the moment."""
    emptied: int = 0
    _guard: Guard = field(default_factory=Guard)
    _peaks: Peaks = field(default_factory=Peaks)
    _failure: str = ""
    _calm: bool = False
    """Whether an attempt has failed in a hurry: no other one before the hurry is over."""
    _counts: Mapping[str, int] = field(default_factory=dict)
    _looking: Errand[Look] | None = None
    _warming: Errand[str] | None = None
    _tried: set[tuple[str, str]] = field(default_factory=set)
    """(node, URI) that were to be warmed since the fleet came to rest."""
    _verdicts: tuple[Verdict, ...] = ()
    _destinations: dict[str, list[str]] = field(default_factory=dict)

    @property
    def _pace(self) -> Pace:
        return self.desk.tuning.pace(self.ray_stable_s)

    @property
    def is_waiting_for_answer(self) -> bool:
        """Say whether it wants to be asked again at the next loop."""
        return self._looking is not None or self._warming is not None

    def may_begin(self, now: float, unrest: str, counts: Mapping[str, int]) -> bool:
        """Say whether a node may be looked for; called on every loop while none is emptied.

        `unrest` says why the fleet is not at rest; empty when it is.
        """
        self._counts = counts
        self._peaks = self._peaks.noted(now, counts, self.desk.tuning.look_back_s)
        self._guard = self._guard.seen(now, not unrest)
        if unrest:
            self._start_over()
            self._show("waiting", unrest)
            return False
        if holder := self.desk.lease_holder:
            self._show("blocked", f"{holder} drains nodes")
            return False
        self._calm = self._calm and self.desk.hurried
        wait_s = self._guard.wait_s(now, self._pace)
        if wait_s and not (self.desk.hurried and not self._calm):
            self._show("waiting", f"for {wait_s:.0f} s more: stability, cooldown, back-off")
            return False
        return True

    def blocked(self, why: str) -> None:
        """Note that Ray itself does not compact now."""
        self._start_over()
        self._show("blocked", why)

    def missing(self) -> dict[str, int]:
        """Return how many replicas each workload had lately on top of those of now."""
        return self._peaks.above(self._counts)

    def choose(self, fleet_of: Callable[[Look], Fleet]) -> str | None:
        """Return the node that Ray is to empty; None while there is none, or not yet."""
        if not self._is_warm():
            return None
        if self._looking is None:
            self._looking = Errand(self._look, _LOOK_S, "looking")
            return None
        if not self._looking.is_over():
            return None
        errand, self._looking = self._looking, None
        fleet = fleet_of(errand.result())
        decision = planner.choose(fleet, self.desk.tuning.limits(self.placed_by_ray))
        self._verdicts = decision.verdicts
        if decision.plan is None:
            self._tried.clear()
            self._show("settled", "no node can be emptied")
            return None
        return self._begun(fleet, decision.plan)

    def _look(self) -> Look:
        return Look(self.facts(), self.desk.held(uris_of(self.desk.weights)))

    def _begun(self, fleet: Fleet, plan: Plan) -> str | None:
        wanted = {
            node_id: tuple(uri for uri in uris if (node_id, uri) not in self._tried)
            for node_id, uris in wanted_by(fleet, plan).items()
        }
        wanted = {node_id: uris for node_id, uris in wanted.items() if uris}
        if wanted:
            self._warm(plan, wanted)
            return None
        self.plan = plan
        self._tried.clear()
        self._destinations = _destinations(fleet, plan)
        log.info("weightstream: emptying node %s: %s", plan.node_id, _text(plan))
        self._show("moving", _text(plan))
        return plan.node_id

    def _warm(self, plan: Plan, wanted: Mapping[str, tuple[str, ...]]) -> None:
        self._tried |= {(node_id, uri) for node_id, uris in wanted.items() for uri in uris}
        text = f"{len(wanted)} nodes, to take the replicas of {plan.node_id}"
        log.info("weightstream: warming %s: %s", text, dict(wanted))
        self._show("warming", text)
        limit_s = self.desk.tuning.warm_s
        self._warming = Errand(lambda: self.warm(wanted, limit_s), limit_s, "warming")

    def _is_warm(self) -> bool:
        """Say whether nobody waits for destinations any more; a cold one delays, but no longer."""
        errand = self._warming
        if errand is None:
            return True
        if not errand.is_over():
            return False
        self._warming = None
        try:
            cold = errand.result()
        except Exception as error:  # without agents, replicas load by themselves
            cold = f"{type(error).__name__}: {error}"
        if cold:
            log.warning("weightstream: compaction goes on without all destinations warm: %s", cold)
        return True

    def destination(self, name: str, offered: Callable[[str], bool]) -> str | None:
        """Return where the plan puts the next replica of a workload, if that is on offer."""
        return next((one for one in self._destinations.get(name, ()) if offered(one)), None)

    def placed(self, name: str, node_id: str | None) -> None:
        """Note that a replica of a workload was sent to a node."""
        if node_id in (places := self._destinations.get(name, [])):
            places.remove(node_id)

    def releasing(self) -> None:
        """Note that all replicas have left the node."""
        self._show("releasing", "empty; waiting for somebody to take it")

    def succeeded(self, now: float) -> None:
        """Note that the node was emptied, and taken or given up."""
        self.emptied += 1
        self._failure = ""
        self._guard = self._guard.succeeded(now, self._pace)
        self._over("emptied the node")

    def failed(self, now: float, why: str) -> None:
        """Note that the node was not emptied."""
        self._failure, self._calm = why, True
        self._guard = self._guard.failed(now, self._pace)
        self._over(why)

    def dropped(self) -> None:
        """Note that the node went away by itself, or Ray's packing ended."""
        self._over("the node went away by itself")

    def _over(self, text: str) -> None:
        self.plan = None
        self._destinations = {}
        self._start_over()
        self._show("waiting", text)

    def _start_over(self) -> None:
        self._looking = self._warming = None
        self._tried.clear()

    def _show(self, phase: str, text: str) -> None:
        node_id = self.plan.node_id if self.plan else ""
        rows, missing = rows_of(self._verdicts), self.missing()
        failures = self._guard.failures, self._failure
        self.desk.show(State(phase, text, node_id, rows, *failures, self.emptied, missing))


def _destinations(fleet: Fleet, plan: Plan) -> dict[str, list[str]]:
    names = {one.id: one.workload.name for one in fleet.node(plan.node_id).replicas}
    places: dict[str, list[str]] = {}
    for replica_id, node_ids in plan.moves.items():
        places.setdefault(names[replica_id], []).append(node_ids[0])
    return places


def _text(plan: Plan) -> str:
    counts = Counter(node_ids[0] for node_ids in plan.moves.values())
    places = ", ".join(f"{count} to {node_id}" for node_id, count in sorted(counts.items()))
    return f"{len(plan.moves)} replicas, {places}; {plan.load_bytes} bytes to load"
