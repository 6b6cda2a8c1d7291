"""Measures weightstream beside its peers: `python -m weightstream.bench cold-load`.

One run makes every row of the targets, as ratios within that run. Tables go to stdout, progress to
stderr, JSON, Markdown and plots to OUT/results.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console

from weightstream.bench import runners
from weightstream.bench.claims import Facts, claims
from weightstream.bench.errors import BenchError
from weightstream.bench.execute import BUCKET, Bench, Place, convert
from weightstream.bench.jobs import Sample
from weightstream.bench.links import Link, parse_link, why_not
from weightstream.bench.machine import describe_machine, versions
from weightstream.bench.mounts.plan import PEERS as MOUNT_PEERS
from weightstream.bench.mounts.plan import MountCell, mount_cells
from weightstream.bench.mounts.private import enter as enter_private_mounts
from weightstream.bench.mounts.run import run_mounts
from weightstream.bench.parts import Part
from weightstream.bench.plots import write_plots
from weightstream.bench.report import Report, markdown, print_report, write_json
from weightstream.bench.scenarios import SCENARIOS, Cell, cells
from weightstream.demo.checkpoint import Checkpoint, write_checkpoint
from weightstream.errors import WeightstreamError
from weightstream.settings import parse_bytes

_SHARDS = 4
_QUICK_BYTES = 256 << 20
_SLOWEST_BYTES_S = 20e6  # a sample that is slower than this is given up
_LEAST_TIMEOUT_S = 120.0


_ALL_PEERS = tuple(dict.fromkeys((*runners.NAMES, *MOUNT_PEERS)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 when every measured target is met, 1 when not, 2 on bad use."""
    options = _parser().parse_args(arguments)
    progress = Console(stderr=True)
    try:
        report = _run(options, progress, sys.argv if arguments is None else ["bench", *arguments])
    except WeightstreamError as error:
        progress.print(f"bench: {error}", style="red", highlight=False)
        return 2
    except KeyboardInterrupt:
        return 130
    folder = options.out / "results" / report.date.replace(":", "")
    folder.mkdir(parents=True)
    write_json(report, folder / "report.json")
    (folder / "report.md").write_text(markdown(report))
    plots = write_plots(report, folder)
    print_report(report, Console(width=max(160, Console().width)))
    progress.print(f"{folder}: report.json, report.md, {', '.join(p.name for p in plots)}")
    return 1 if any(claim.passed is False for claim in report.claims) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="weightstream bench", description=__doc__)
    parser.add_argument("scenario", nargs="?", default="all", choices=(*SCENARIOS, "all"))
    parser.add_argument("--size", default="2GiB", help="size of the generated model")
    parser.add_argument("--repeat", type=int, default=3, help="samples per peer and cell")
    parser.add_argument("--links", default="loopback,1,2,5,10", help="loopback and Gbit/s rates")
    parser.add_argument("--peers", default="", help=f"only these of {', '.join(_ALL_PEERS)}")
    parser.add_argument("--cells", default="", help="only cells whose name has one of these parts")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="data and results")
    parser.add_argument("--quick", action="store_true", help="256 MiB, one sample: a smoke test")
    return parser


def _run(options: argparse.Namespace, progress: Console, command: Sequence[str]) -> Report:
    size_bytes = _QUICK_BYTES if options.quick else parse_bytes(options.size)
    if not isinstance(size_bytes, int):
        raise BenchError(f"--size {options.size!r}: use a size such as 2GiB")
    repeats = 1 if options.quick else max(1, options.repeat)
    links, notes = _links(options.links)
    loads, mounts = _plan(options, links)
    out = options.out.resolve()
    part = Part(notes=notes)
    if loads:
        part += _run_loads(out, size_bytes, repeats, loads, progress)
    if mounts:
        enter_private_mounts()
        part += run_mounts(
            out, size_bytes, repeats, mounts, partial(_say, progress), partial(_title, progress)
        )
    return Report(
        command=shlex.join(_shown(command)),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        machine=describe_machine(out),
        versions=versions(part.packages),
        server=part.server,
        model=_name(size_bytes),
        model_bytes=size_bytes,
        repeats=repeats,
        notes=part.notes,
        titles=part.titles,
        samples=part.samples,
        claims=part.claims,
    )


def _plan(
    options: argparse.Namespace, links: Sequence[Link]
) -> tuple[tuple[Cell, ...], tuple[MountCell, ...]]:
    """Return what to measure: cells of loads and cells of mounts."""
    peers = tuple(name for name in options.peers.split(",") if name)
    if unknown := set(peers) - set(_ALL_PEERS):
        raise BenchError(f"--peers: no such peer: {', '.join(sorted(unknown))}")
    chosen = SCENARIOS if options.scenario == "all" else (options.scenario,)
    parts = options.cells.split(",")
    every = cells(chosen, links, peers)
    loads = tuple(cell for cell in every if any(part in cell.name for part in parts))
    wanted = mount_cells(links, peers, quick=options.quick) if "mount" in chosen else ()
    mounts = tuple(cell for cell in wanted if any(part in cell.name for part in parts))
    if not loads and not mounts:
        raise BenchError("nothing to measure: no cell fits --links, --peers and --cells")
    return loads, mounts


def _run_loads(
    out: Path, size_bytes: int, repeats: int, plan: tuple[Cell, ...], progress: Console
) -> Part:
    model = _model(out, size_bytes, progress)
    with tempfile.TemporaryDirectory(prefix="weightstream-bench-", dir="/dev/shm") as memory:
        place = Place(out / "root", out / "work", Path(memory) / "memory")
        timeout_s = max(_LEAST_TIMEOUT_S, model.size_bytes / _SLOWEST_BYTES_S)
        bench = Bench(place, model, repeats, timeout_s, partial(_say, progress))
        try:
            server, samples = _measure(bench, plan, progress)
        finally:
            shutil.rmtree(place.work, ignore_errors=True)
    used = {variant.peer for cell in plan for variant in cell.variants}
    return Part(
        server,
        tuple((cell.name, cell.title) for cell in plan),
        samples,
        claims(samples, Facts(model.size_bytes)),
        _NOTES,
        frozenset(name for peer in used for name in runners.peer(peer).packages),
    )


_NOTES = (
    "wall is from the call to the last tensor; for peers that map files, plus reading one byte of "
    "every page. Imports and the checksum of all bytes are timed apart.",
    "The server is nginx from a warm page cache on the same cores; it does not check signatures.",
    "On the unshaped loopback, and where the page cache was evicted, memory of the model's size is "
    "touched and freed right before each load, the same for all: where a virtual machine gives "
    "free memory back to its host, a load would else be charged with the host's page faults (up to "
    "1.6 CPU s/GB here).",
    "CPU s/GB counts the client process and its children; what the kernel does in the server's "
    "context is not in it. peak MiB is VmHWM of the process.",
)


def _links(text: str) -> tuple[tuple[Link, ...], tuple[str, ...]]:
    """Return the links that can be made here, and a note for each that cannot."""
    wanted = [parse_link(part) for part in text.split(",") if part]
    notes = [f"link {link.name} left out: {reason}" for link in wanted if (reason := why_not(link))]
    return tuple(link for link in wanted if not why_not(link)), tuple(notes)


def _model(out: Path, size_bytes: int, progress: Console) -> Checkpoint:
    name = _name(size_bytes)
    with progress.status(f"writing {name}"):
        return write_checkpoint(out / "root" / BUCKET / name, size_bytes, _SHARDS)


def _name(size_bytes: int) -> str:
    return f"llama-{size_bytes >> 20}mib"


def _measure(
    bench: Bench, plan: Sequence[Cell], progress: Console
) -> tuple[str, tuple[Sample, ...]]:
    samples: list[Sample] = []
    server = ""
    if any(variant.peer == "tensorizer" for cell in plan for variant in cell.variants):
        with progress.status("converting the model for tensorizer"):
            convert(bench)
    for cell in plan:
        _title(progress, cell.name, cell.title)
        server, found = bench.run(cell)
        samples += found
    return server, tuple(samples)


def _title(progress: Console, name: str, title: str) -> None:
    progress.print(f"{name}: {title}", style="bold", highlight=False)


def _say(progress: Console, sample: Sample) -> None:
    outcome = sample.outcome
    if outcome is None:
        text = f"failed: {sample.error}"
    else:
        rate = outcome.size_bytes / 1e9 / max(outcome.wall_s, 1e-9)
        text = f"{outcome.wall_s:8.3f} s {rate:7.2f} GB/s"
    line = f"  {sample.round + 1}  {sample.label:40} {text}"
    progress.print(line, highlight=False, soft_wrap=True)


def _shown(command: Sequence[str]) -> list[str]:
    """Return the command as one would type it."""
    return ["weightstream", "bench", *command[1:]]


if __name__ == "__main__":
    sys.exit(main())
