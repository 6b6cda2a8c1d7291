"""The course from a fleet at rest to a node that Ray may empty, without Ray and with a clock."""

import time
from collections.abc import Mapping

import pytest

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction.desk import Desk
from weightstream.serve_integration.compaction.facts import ClusterFacts, NodeFacts
from weightstream.serve_integration.compaction.fleet import Fleet, Model, Workload
from weightstream.serve_integration.compaction.ledger import State
from weightstream.serve_integration.compaction.observe import Placed, View, fleet_of
from weightstream.serve_integration.compaction.pilot import Look, Pilot
from weightstream.serve_integration.compaction.tuning import Tuning

URI = "s3://models/a"
A = Workload("a/App", ({"CPU": 1},), models=(Model(URI, 8),))


class Cluster:
    """Two nodes of which one is enough, and agents that bring what they are told."""

    def __init__(self) -> None:
        self.placed = [Placed("1", A, "x"), Placed("2", A, "y"), Placed("3", A, "y")]
        self.holds: dict[str, dict[str, int]] = {"x": {URI: 8}}
        self.warmed: list[Mapping[str, tuple[str, ...]]] = []
        self.agents_dead = False
        self.desk = Desk(self.held, Tuning(stable_s=10, cooldown_s=5, look_back_s=60))
        self.desk.weights = {"a/App": (registry.Weights(URI, 8),)}
        self.pilot = Pilot(self.desk, self.facts, self.warm, 300.0)

    def facts(self) -> ClusterFacts:
        free = {"x": 4.0, "y": 4.0}
        for one in self.placed:
            free[one.node_id] -= 1
        return ClusterFacts(
            tuple(NodeFacts(n, {"CPU": 4.0}, {"CPU": free[n]}, {}, False, False) for n in free)
        )

    def held(self, uris: tuple[str, ...]) -> Mapping[str, Mapping[str, int]]:
        return self.holds

    def warm(self, wanted: Mapping[str, tuple[str, ...]], timeout_s: float) -> str:
        self.warmed.append(wanted)
        if self.agents_dead:
            raise ConnectionRefusedError("nobody there")
        for node_id, uris in wanted.items():
            self.holds.setdefault(node_id, {}).update(dict.fromkeys(uris, 8))
        return ""

    def fleet(self, look: Look) -> Fleet:
        return fleet_of(look.facts, self.placed, View(look.holds))

    def ask(self) -> str | None:
        """Ask until it needs no more time."""
        for _ in range(500):
            found = self.pilot.choose(self.fleet)
            if not self.pilot.is_waiting_for_answer:
                return found
            time.sleep(0.01)
        raise AssertionError("it never answers")

    def begin(self, now: float, unrest: str = "") -> bool:
        return self.pilot.may_begin(now, unrest, {"a/App": len(self.placed)})

    @property
    def state(self) -> State:
        assert self.desk.state is not None
        return self.desk.state


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def test_it_waits_until_the_fleet_has_stood_still(cluster: Cluster) -> None:
    assert not cluster.begin(100)
    assert cluster.state.text.startswith("for 10 s more")
    assert cluster.begin(110)
    assert not cluster.begin(111, "a/App: 1 of 2 replicas run")
    assert cluster.state == State("waiting", "a/App: 1 of 2 replicas run", at=cluster.state.at,
                                  heard=cluster.state.heard)  # fmt: skip
    assert not cluster.begin(112)


def test_who_is_in_a_hurry_waits_only_for_a_fleet_that_changes(cluster: Cluster) -> None:
    cluster.desk.hurried = True
    assert cluster.begin(100)
    assert not cluster.begin(101, "a/App is UPDATING")


def test_a_failure_ends_the_hurry(cluster: Cluster) -> None:
    cluster.desk.hurried = True
    assert cluster.begin(100)
    cluster.pilot.failed(101, "bad luck")
    assert not cluster.begin(102)
    cluster.desk.hurried = False
    assert not cluster.begin(103)
    cluster.desk.hurried = True
    assert cluster.begin(104)


def test_nothing_is_begun_while_somebody_drains_nodes(cluster: Cluster) -> None:
    cluster.desk.lease_holder, cluster.desk.hurried = "somebody", True
    assert not cluster.begin(100)
    assert (cluster.state.phase, cluster.state.text) == ("blocked", "somebody drains nodes")


def test_destinations_are_warm_before_anything_moves(cluster: Cluster) -> None:
    assert cluster.ask() == "x"
    assert cluster.warmed == [{"y": (URI,)}]
    assert cluster.state.phase == "moving"
    assert cluster.pilot.destination("a/App", lambda node_id: True) == "y"
    cluster.pilot.placed("a/App", "y")
    assert cluster.pilot.destination("a/App", lambda node_id: True) is None


def test_without_agents_it_goes_on_cold_after_one_try(cluster: Cluster) -> None:
    cluster.agents_dead = True
    assert cluster.ask() == "x"
    assert len(cluster.warmed) == 1


def test_a_fleet_that_changed_while_destinations_were_warmed_is_looked_at_again(
    cluster: Cluster,
) -> None:
    while not cluster.warmed:
        assert cluster.pilot.choose(cluster.fleet) is None
        time.sleep(0.01)
    cluster.placed += [Placed("4", A, "y"), Placed("5", A, "y")]  # four on y: no room for another
    assert cluster.ask() is None
    assert cluster.state.phase == "settled"
    assert [outcome for _, outcome, _ in cluster.state.verdicts] == ["no room", "no room"]


def test_failures_and_successes_are_counted_and_waited_after(cluster: Cluster) -> None:
    cluster.begin(100)
    cluster.pilot.failed(110, "bad luck")
    assert (cluster.state.failures, cluster.state.phase) == (1, "waiting")
    assert not cluster.begin(111, "a/App is UPDATING")
    assert cluster.state.failure == "bad luck", "also when something else has happened since"
    assert not cluster.begin(112)
    assert cluster.begin(151)
    cluster.pilot.succeeded(151)
    assert (cluster.state.failures, cluster.state.failure, cluster.state.emptied) == (0, "", 1)
    assert not cluster.begin(152)
    assert cluster.begin(156)


def test_the_peak_of_lately_is_in_the_state(cluster: Cluster) -> None:
    cluster.begin(100)
    del cluster.placed[2:]
    cluster.begin(105)
    assert cluster.state.missing == {"a/App": 1}
