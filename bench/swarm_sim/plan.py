"""Which crowds are simulated, and what was measured of the small ones."""

from dataclasses import dataclass, replace

from weightstream.bench.swarm_sim.scenario import MBIT, Scenario

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """A scenario, what it has to reach, and what a real run of it took."""

    scenario: Scenario
    group: str
    most_times: float | None = None
    most_egress: float | None = None
    measured_s: tuple[float, float] | None = None
    """Least and most, of the slowest node. Namespaces with shaped links on two cores."""
    measured_egress: float | None = None


_SMALL = Scenario("", 8)
_LARGE = Scenario("", 1000, size_bytes=512 * MIB, piece_bytes=512 << 10, fan_out=3, ahead_chunks=16)


def cases(most_nodes: int) -> tuple[Case, ...]:
    """Return every case of crowds up to a size."""
    found = (*_validation(), *_trouble(), *_growth(), *_thousand())
    return tuple(case for case in found if case.scenario.nodes <= most_nodes)


def _validation() -> tuple[Case, ...]:
    """What `make bench-swarm` measures too; see docs/peers.md."""

    def case(name: str, measured: tuple[float, float], egress: float, **change: object) -> Case:
        scenario = replace(_SMALL, name=name, chunk_bytes=8 * MIB, **change)  # type: ignore[arg-type]
        return Case(scenario, "measured", measured_s=measured, measured_egress=egress)

    return (
        case("2 nodes", (11.5, 11.8), 1.0, nodes=2),
        case("4 nodes", (11.7, 11.8), 1.0, nodes=4),
        case("8 nodes", (12.1, 12.8), 1.0),
        case("8 nodes, capped at 50 Mbit/s", (12.0, 12.3), 1.0, client_bytes_s=50 * MBIT),
        case("5 nodes, 4 hold it all", (11.3, 11.5), 0.0, nodes=5, warm=4),
    )


def _trouble() -> tuple[Case, ...]:
    base = replace(_SMALL, chunk_bytes=8 * MIB)
    measured = {
        "1.5 s apart": ((11.7, 12.0), 1.0),
        "one dies": ((12.4, 12.5), 1.01),
        "two die": ((12.3, 12.6), 1.02),
    }
    return tuple(
        Case(
            replace(scenario, name=f"8 nodes, {scenario.name}"),
            "trouble",
            times,
            egress,
            *measured.get(scenario.name, (None, None)),
        )
        for scenario, times, egress in (
            (replace(base, name="1.5 s apart", stagger_s=1.5), 1.25, 1.1),
            (replace(base, name="one holds it all", warm=1), 1.25, 0.0),
            (replace(base, name="7 hold it all", warm=7), 1.05, 0.0),
            (replace(base, name="one dies", dying=0.125), 1.3, 1.13),
            (replace(base, name="two die", dying=0.25), 1.3, 1.25),
            (replace(base, name="one turns 10x slower", slowed=1), 1.3, 1.13),
            (replace(base, name="one starved by the origin", starved=1), None, None),
            (replace(base, name="all 0.1 s apart", stagger_s=0.1), 1.25, 1.05),
        )
    )


def _growth() -> tuple[Case, ...]:
    meshes = (
        Case(replace(_LARGE, name=f"{n} nodes, mesh", nodes=n, fan_out=None), "growth")
        for n in (10, 16, 32, 100)
    )
    trees = (
        Case(replace(_LARGE, name=f"{n} nodes", nodes=n), "growth", 1.2, 1.05)
        for n in (32, 100, 1000)
    )
    # A small blob, of which filling a tree 9 deep takes a large part.
    most = replace(_LARGE, name="10000 nodes, 128 MiB", nodes=10_000, size_bytes=128 * MIB)
    return (*meshes, *trees, Case(replace(most, slow_detected=False), "growth"))


def _thousand() -> tuple[Case, ...]:
    return tuple(
        Case(replace(scenario, name=f"1000 nodes, {scenario.name}"), "thousand", 1.2, 1.05)
        for scenario in (
            replace(_LARGE, name="1 % die", dying=0.01),
            replace(_LARGE, name="1 % die, 1 % join", dying=0.01, joining=0.01),
            replace(_LARGE, name="links of 0.8 to 1.25", skew=1.25),
            replace(_LARGE, name="4 zones, a tenth between", zones=4, cross_share=0.1),
        )
    )
