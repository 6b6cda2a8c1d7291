"""The simulator: links share fairly, everybody gets everything, a seed gives one run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from weightstream.bench.swarm_sim.__main__ import main
from weightstream.bench.swarm_sim.crowd import Crowd, Outcome
from weightstream.bench.swarm_sim.network import Flow, Link, Network
from weightstream.bench.swarm_sim.plan import cases
from weightstream.bench.swarm_sim.scenario import Scenario

MIB = 1 << 20
SMALL = Scenario("small", 4, size_bytes=32 * MIB, chunk_bytes=MIB, window_bytes=16 * MIB)


def simulate(**change: object) -> Outcome:
    return Crowd(replace(SMALL, **change)).run()  # type: ignore[arg-type]


def arrivals(paths: dict[str, tuple[Link, ...]], pieces: int) -> dict[str, float]:
    """Return when the last of `pieces` pieces has come over each path, all sent at once."""
    network = Network()
    left = dict.fromkeys(paths, pieces)
    ended: dict[str, float] = {}

    def delivered(flow: Flow) -> None:
        name = flow.target
        left[name] -= 1
        if left[name] == 0:
            ended[name] = network.now_s
        network.offer(flow, pieces)

    for name, path in paths.items():
        network.offer(Flow(None, name, 0, path, delivered), pieces)
    assert network.run(1e6)
    return ended


def test_a_link_is_shared_evenly() -> None:
    link = Link(10.0)
    ended = arrivals({"a": (link,), "b": (link,)}, 100)
    assert ended["a"] == pytest.approx(20.0, rel=0.02)
    assert ended["b"] == pytest.approx(20.0, rel=0.02)


def test_rates_are_max_min_fair() -> None:
    """One flow is held to 2 by its own link: the other gets what that leaves, not a half."""
    shared, narrow = Link(10.0), Link(2.0)
    ended = arrivals({"held": (shared, narrow), "free": (shared,)}, 80)
    assert ended["held"] == pytest.approx(40.0, rel=0.05)
    assert ended["free"] == pytest.approx(10.0, rel=0.1)


def test_pieces_of_a_closed_flow_go_nowhere() -> None:
    network, link = Network(), Link(1.0)
    got: list[Flow] = []
    flow = Flow(None, "x", 0, (link, Link(1.0)), got.append)
    network.offer(flow, 2)
    network.after(0.5, lambda: setattr(flow, "closed", True))
    network.run(100.0)
    assert got == []


@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
def test_a_crowd_loads_once_from_the_origin(nodes: int) -> None:
    outcome = simulate(nodes=nodes)
    assert outcome.finished == nodes
    assert outcome.egress == 1.0
    assert outcome.last_s >= outcome.bound_s


def test_the_same_seed_gives_the_same_run() -> None:
    change = {"nodes": 12, "dying": 0.2, "joining": 0.2, "skew": 1.5, "zones": 3, "fan_out": 2}
    assert simulate(**change) == simulate(**change)
    assert simulate(**change) != simulate(**change, seed=2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "change",
    [
        {"dying": 0.3},
        {"dying": 0.3, "resume": False},
        {"dying": 0.3, "joining": 0.4},
        {"dying": 0.2, "joining": 0.4, "fan_out": 2, "ahead_chunks": 8},
        {"dying": 0.2, "skew": 3.0, "zones": 2, "cross_share": 0.2, "fan_out": 3},
        {"stagger_s": 0.2, "dying": 0.3},
        {"slowed": 2, "joining": 0.3},
    ],
    ids=lambda change: "-".join(change),
)
def test_all_who_live_get_everything(change: dict[str, object], seed: int) -> None:
    outcome = simulate(nodes=13, seed=seed, **change)
    assert outcome.finished == outcome.lived
    assert outcome.egress < 2.0


def test_who_joins_the_warm_takes_nothing_from_the_origin() -> None:
    for warm in (1, 3, 7):
        outcome = simulate(nodes=8, warm=warm)
        assert (outcome.finished, outcome.egress) == (8 - warm, 0.0)


def test_late_joiners_cost_the_origin_nothing() -> None:
    outcome = simulate(nodes=8, stagger_s=0.3)
    assert outcome.finished == 8
    assert outcome.egress == 1.0
    assert outcome.last_s < 1.1 * simulate(nodes=1).last_s


def test_a_capped_origin_is_read_by_all_at_once() -> None:
    cap = SMALL.link_bytes_s / 4
    alone, together = simulate(nodes=1, client_bytes_s=cap), simulate(client_bytes_s=cap)
    assert together.last_s < alone.last_s / 3


def test_a_border_is_crossed_once_a_chunk() -> None:
    """Four zones on links so narrow that anything more would be felt."""
    change = {"nodes": 32, "zones": 4, "fan_out": 2, "ahead_chunks": 16}
    wide, narrow = simulate(**change), simulate(**change, cross_share=0.3)
    assert narrow.last_s < 1.2 * wide.last_s


def test_every_small_case_meets_its_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--nodes", "8", "--jobs", "1", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(cases(8))
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name.endswith("-sim")
    assert len(json.loads((folder / "swarm.json").read_text())) == len(cases(8))
    assert (folder / "swarm.png").stat().st_size > 1000


def test_simulated_times_are_near_the_measured_ones() -> None:
    for case in cases(8):
        if case.measured_s is not None:
            low, high = case.measured_s
            outcome = Crowd(case.scenario).run()
            assert 0.9 * low <= outcome.last_s <= 1.1 * high
