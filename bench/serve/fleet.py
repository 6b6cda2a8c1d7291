"""What compaction saves: `python -m weightstream.bench.serve.fleet [--seed 3] [--tail 120]`.

Runs of the same trace, each on a cluster of its own with five workers: without compaction, with
Ray's, and with ours, with and without room for the load of lately. The load fills the workers one
after the other with replicas of eight apps of random sizes; then the load of random apps drops to
nothing, and traffic goes on against the others. The seed decides what can be saved: with seed 3
four of the five workers are still in use and two would do: of seeds 1 to 30 most often so.
"""

import argparse
import json
import os
import subprocess
import sys

from rich.console import Console
from rich.table import Table

from weightstream.bench.errors import BenchError
from weightstream.bench.serve.fleet_run import KINDS, Outcome

_TIMEOUT_S = 1200.0


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--tail", type=float, default=120.0, help="seconds after the last drop")
    parser.add_argument("--only", choices=KINDS, action="append", help="run just this one")
    given = parser.parse_args()
    outcomes = [_run(kind, given.seed, given.tail) for kind in given.only or KINDS]
    Console(width=120).print(_shown(outcomes))
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    print(f"seed {given.seed}, {os.cpu_count()} cores, load {load} (1, 5, 15 min)")
    for one in outcomes:
        gone = ", ".join(f"{at_s:.0f}" for at_s in one.gone_at_s) or "never"
        print(f"{one.kind}: nodes gone after (s): {gone}")
        for failure in one.failures[:5]:
            print(f"{one.kind}: failed: {failure}")


def _run(kind: str, seed: int, tail_s: float) -> Outcome:
    module = "weightstream.bench.serve.fleet_run"
    line = [sys.executable, "-m", module, kind, "--seed", str(seed), "--tail", str(tail_s)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if ended.returncode != 0:
        raise BenchError(f"{kind}:\n{ended.stderr[-4000:]}")
    values = json.loads(ended.stdout.splitlines()[-1])
    tuples = {name: tuple(one) for name, one in values.items() if isinstance(one, list)}
    outcome = Outcome(**values | tuples)
    print(outcome, file=sys.stderr)  # a later run may fail, which costs minutes
    return outcome


def _shown(outcomes: list[Outcome]) -> Table:
    shown = Table(box=None, pad_edge=False)
    shown.add_column("compaction")
    headers = ("workers left", "best fit", "node-seconds", "of none", "requests", "failed", "p99")
    for header in headers:
        shown.add_column(header, justify="right")
    none = next((one.node_seconds for one in outcomes if one.kind == "none"), 0.0)
    for one in outcomes:
        shown.add_row(
            one.kind,
            str(one.nodes),
            str(one.best),
            f"{one.node_seconds:.0f}",
            f"{one.node_seconds / none:.2f}" if none else "",
            f"{one.requests:,} ({one.streams} streams)",
            str(len(one.failures)),
            f"{one.p99_s:.2f} s",
        )
    return shown


if __name__ == "__main__":
    main()
