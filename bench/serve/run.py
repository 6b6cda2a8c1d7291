"""Starts and moves of replicas on clusters of namespaces: `make bench-serve`.

    python -m weightstream.bench.serve.run [--only second peer moves] [--repeat 3] [--json FILE]

    second   a second replica on a node that holds the model, against s3fs and safetensors, from an
             S3 server at 1 Gbit/s; a process waits for both
    peer     a first replica on a node whose peer holds it, link 1 Gbit/s, origin 200 Mbit/s
    moves    a rolling update, agents killed, a migration, under traffic

`weightstream.bench.serve.fleet` measures compaction, `.burst` scaling, `.planner` the planner.
"""

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weightstream.bench.machine import describe_machine
from weightstream.bench.serve import model
from weightstream.bench.serve.cluster import Shape, cluster

_BUCKET = "models"
_URI = f"s3://{_BUCKET}/llm/"
_REPLICAS = "weightstream.bench.serve.replicas"
_MOVES = "weightstream.bench.serve.moves"

Sample = dict[str, Any]


class Bench:
    """The model's folder, and where clusters keep their files."""

    def __init__(self, folder: Path) -> None:
        self._root = folder / "root"
        self.folder = folder
        self._runs = 0
        model.write(self._root / _BUCKET / "llm")

    def drive(self, shape: Shape, module: str, *arguments: str) -> list[Sample]:
        """Run a module in a fresh cluster; return its rows."""
        self._runs += 1
        folder = self.folder / f"run-{self._runs}"
        try:
            with cluster(shape, self._root, _BUCKET, folder) as running:
                rows: list[Sample] = running.drive(module, *arguments)
                return rows
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def second(bench: Bench) -> list[Sample]:
    """Return first and second starts on one node, by both loaders."""
    rows: list[Sample] = []
    for loader in ("Streamed", "Downloaded"):
        one, two = bench.drive(
            Shape(1), _REPLICAS, loader, _URI, "--second", "--agents", "--standby", "2"
        )
        _say(f"{loader}: first {one['seconds']:.2f} s, second {two['seconds']:.2f} s")
        rows.append({"loader": loader, "first": one, "second": two})
    return rows


def peer(bench: Bench) -> list[Sample]:
    """Return the first start in the cluster, and the first on the other node."""
    shape = Shape(2, cpus=1, origin_mbit=200)
    one, two = bench.drive(
        shape, _REPLICAS, "Streamed", _URI, "--second", "--agents", "--standby", "1"
    )
    assert one["node"] != two["node"]
    _say(f"from the origin {one['seconds']:.2f} s, from the peer {two['seconds']:.2f} s")
    return [{"origin": one, "peer": two}]


def moves(bench: Bench) -> list[Sample]:
    """Return what came of the traffic during each move."""
    rows = bench.drive(Shape(4), _MOVES, _URI)
    for row in rows:
        lost = f"{len(row['failures'])} failed of {row['requests']} ({row['streams']} streams)"
        served = f"{row['served_least']} of {row['wanted']} served at the least"
        took = ", ".join(f"{one:.2f}" for one in row["replacements_s"])
        _say(f"{row['move']}: {lost}; {served}; replacements {took} s; {row['failures'][:3]}")
    return rows


_SCENARIOS: dict[str, Callable[[Bench], list[Sample]]] = {
    "second": second,
    "peer": peer,
    "moves": moves,
}


def main() -> None:
    """Run the scenarios, interleaved, and print what they came to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=_SCENARIOS, default=[])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that clusters end with it
    found: dict[str, list[Sample]] = {}
    with tempfile.TemporaryDirectory(prefix="ws-serve-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder))
        for _ in range(given.repeat):
            for name in given.only or _SCENARIOS:
                found.setdefault(name, []).extend(_SCENARIOS[name](bench))
        machine = asdict(describe_machine(bench.folder))
    for line in claims(found):
        _say(line)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine, "samples": found}))


def claims(found: dict[str, list[Sample]]) -> list[str]:
    """Return a line for each target that the samples speak of."""
    lines = []
    if rows := found.get("second"):
        ours, theirs = (
            statistics.median(row["second"]["seconds"] for row in rows if row["loader"] == loader)
            for loader in ("Streamed", "Downloaded")
        )
        lines.append(f"second replica: {ours:.2f} s (1.0); {theirs / ours:.1f}x s3fs (4)")
    if rows := found.get("peer"):
        ratio = statistics.median(row["peer"]["seconds"] / row["origin"]["seconds"] for row in rows)
        lines.append(f"first replica beside a peer: {ratio:.2f} of the origin-only start (0.3)")
    for row in found.get("moves", ()):
        lines.append(f"{row['move']}: {len(row['failures'])} of {row['requests']} failed (0)")
    if ready := _migrated(found.get("moves", ())):
        lines.append(f"replacement ready after {statistics.median(ready):.2f} s (1.5)")
    return lines


def _migrated(rows: Sequence[Sample]) -> list[float]:
    return [s for row in rows if row["move"] == "migration" for s in row["replacements_s"]]


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
