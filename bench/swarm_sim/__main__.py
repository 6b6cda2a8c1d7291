"""Simulates crowds of peers: `python -m weightstream.bench.swarm_sim`.

The table goes to stdout, progress to stderr, JSON and a picture to OUT/results.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

from weightstream.bench.swarm_sim.plan import cases
from weightstream.bench.swarm_sim.report import Result, markdown, simulate, write_json, write_plot


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the simulator; return 0 when every target is met, 1 when not."""
    options = _parser().parse_args(arguments)
    chosen = [case for case in cases(options.nodes) if options.only in case.scenario.name]
    results: list[Result] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for result in pool.map(simulate, chosen):
            results.append(result)
            print(f"{result.case.scenario.name}: {result.wall_s:.1f} s", file=sys.stderr)
    print(markdown(results))
    folder = options.out / "results" / f"{datetime.now(UTC):%Y-%m-%dT%H%M%S}-sim"
    folder.mkdir(parents=True)
    write_json(results, folder / "swarm.json")
    write_plot(results, folder / "swarm.png")
    print(f"written to {folder}", file=sys.stderr)
    return 1 if any(result.is_met is False for result in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m weightstream.bench.swarm_sim")
    parser.add_argument(
        "--nodes", type=int, default=1000, help="largest crowd (10000 takes half an hour)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="crowds at a time")
    parser.add_argument("--only", default="", help="only crowds with this in their name")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="where results go")
    return parser


if __name__ == "__main__":
    sys.exit(main())
