"""What the simulator says: a table, JSON, a picture."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from weightstream.bench.swarm_sim.crowd import Crowd, Outcome
from weightstream.bench.swarm_sim.plan import Case

_COLORS = {True: "#0b6e4f", False: "#b3261e", None: "#9aa5b1"}
"""Target met, missed, none."""


@dataclass(frozen=True, slots=True)
class Result:
    """A case and what came of it."""

    case: Case
    outcome: Outcome
    wall_s: float

    @property
    def is_met(self) -> bool | None:
        """Say whether the targets are met; None where there is none."""
        case, outcome = self.case, self.outcome
        if case.most_times is None or case.most_egress is None:
            return None
        done = outcome.finished == outcome.lived
        return (
            done
            and outcome.times_bound <= case.most_times
            and outcome.egress <= case.most_egress + 1e-9
        )


def simulate(case: Case) -> Result:
    """Run one case."""
    began_s = time.monotonic()
    outcome = Crowd(case.scenario).run()
    return Result(case, outcome, time.monotonic() - began_s)


def markdown(results: Sequence[Result]) -> str:
    """Return a table with a line for each result."""
    head = "| crowd | bound s | slowest s | x bound | x own bound | egress | target | measured |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *map(_line, results)])


def _line(result: Result) -> str:
    case, outcome = result.case, result.outcome
    target = measured = ""
    if case.most_times is not None:
        target = f"<= {case.most_times:g}x, {case.most_egress:g}: {'ok' if result.is_met else 'NO'}"
    if case.measured_s is not None:
        low, high = case.measured_s
        span = f"{low:g}" if low == high else f"{low:g}-{high:g}"
        measured = f"{span} s, {case.measured_egress:g}"
    lost = "" if outcome.finished == outcome.lived else f" ({outcome.finished}/{outcome.lived})"
    cells = (
        case.scenario.name + lost,
        f"{outcome.bound_s:.1f}",
        f"{outcome.last_s:.1f}",
        f"{outcome.times_bound:.3f}",
        f"{outcome.times_own:.3f}",
        f"{outcome.egress:.3f}",
        target,
        measured,
    )
    return f"| {' | '.join(cells)} |"


def write_json(results: Sequence[Result], path: Path) -> None:
    """Write everything but each node's time."""
    found = []
    for result in results:
        outcome = asdict(result.outcome)
        outcome.pop("rates_s")
        found.append(
            {
                "group": result.case.group,
                "met": result.is_met,
                "wall_s": round(result.wall_s, 2),
                "measured_s": result.case.measured_s,
                **outcome,
            }
        )
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_plot(results: Sequence[Result], path: Path) -> None:
    """Draw time and egress against the bound, one line per crowd."""
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(results)), layout="constrained")
    times: Any
    egress: Any
    times, egress = figure.subplots(1, 2, sharey=True)
    places = range(len(results))
    for axes, values, title in (
        (times, [r.outcome.times_bound for r in results], "slowest node, x of the bound"),
        (egress, [r.outcome.egress for r in results], "sent by the origin, x of the blob"),
    ):
        axes.barh(places, values, color=[_COLORS[r.is_met] for r in results])
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {value:.2f}", va="center", fontsize=8)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.margins(x=0.15)
        axes.set_title(title, loc="left", fontsize=10)
    times.set_yticks(places, [r.case.scenario.name for r in results], fontsize=8)
    times.invert_yaxis()
    figure.savefig(path, dpi=140)
