"""`weightstream serve compact`: fewer nodes for the same replicas; shown first, done when asked."""

import logging
import re
import signal
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table
from weightstream.cli.serve.connecting import Address, connected
from weightstream.errors import ClusterError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.serve_integration.compaction.fleet import Fleet, Plan
    from weightstream.serve_integration.compaction.ledger import State
    from weightstream.serve_integration.compaction.survey import Survey
    from weightstream.serve_integration.compaction.tuning import Tuning

_SHORT = 12  # characters of a node's id that a person reads


@dataclass(frozen=True, slots=True)
class Move:
    """A node that can be emptied."""

    node_id: str
    to: dict[str, dict[str, int]]
    """Destination -> deployment -> replicas, or bundles of them."""
    load_bytes: int
    saves: float


@dataclass(frozen=True, slots=True)
class Kept:
    """A node that stays, after all moves."""

    node_id: str
    replicas: int
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a dry run found; nothing was moved."""

    nodes_now: int
    """Workers with replicas."""
    nodes_then: int
    cost_now: float
    cost_then: float
    moves: list[Move]
    kept: list[Kept]
    unrest: str
    why_drain: str
    lease_holder: str
    state: "State | None"


def compact(
    cli: Cli,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what could be moved, and why not more: the default."),
    ] = False,
    now: Annotated[
        bool,
        typer.Option("--now", help="Move it now, without the usual waits."),
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Keep the fleet compact until SIGTERM."),
    ] = False,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Set a wait or a limit for good, such as keep_nodes=2."
        ),
    ] = None,
    address: Address = "auto",
) -> int:
    """Run the same replicas on fewer nodes; without flags, only show what that would come to.

    Serve's controller moves them where the plug-in runs in it; else nodes are drained from here.
    """
    if dry_run + now + watch > 1:
        raise UsageError("--dry-run, --now and --watch exclude each other")
    with connected(address):
        if tune:
            _tune(cli, tune, shown=not (dry_run or now or watch))
        if now:
            return _now(cli)
        if watch:
            return _watch(cli)
        if dry_run or not tune:
            report = _report()
            cli.emit(report, *_parts(report))
    return 0


def _tune(cli: Cli, pairs: list[str], shown: bool) -> None:
    from weightstream.serve_integration.compaction import tuning

    tuning.write(tuned := tuning.with_pairs(tuning.read(), pairs))
    if shown:
        cli.emit(tuned, table(("TUNING", "VALUE"), _tuning_rows(tuned)))


def _tuning_rows(tuned: "Tuning") -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in asdict(tuned).items()]


def _report() -> Report:
    from weightstream.serve_integration.compaction.survey import survey

    found = survey()
    moves, fleet = [], found.fleet
    for plan in found.outlook.plans:
        moves.append(_move(fleet, plan))
        fleet = _after(fleet, plan)
    in_use, left = _in_use(found.fleet), _in_use(fleet)
    return Report(
        len(in_use),
        len(left),
        sum(in_use.values()),
        sum(left.values()),
        moves,
        _kept(found),
        found.unrest,
        found.why_drain,
        found.lease_holder,
        found.state,
    )


def _after(fleet: "Fleet", plan: "Plan") -> "Fleet":
    from weightstream.serve_integration.compaction.fleet import applied

    return applied(fleet, plan)


def _in_use(fleet: "Fleet") -> dict[str, float]:
    """Return the workers that have replicas, and what they cost."""
    return {node.id: node.cost for node in fleet.nodes if node.replicas and not node.head}


def _move(fleet: "Fleet", plan: "Plan") -> Move:
    names = {one.id: one.workload.name for one in fleet.node(plan.node_id).replicas}
    to: dict[str, Counter[str]] = {}
    for replica_id, node_ids in plan.moves.items():
        for node_id in node_ids:
            to.setdefault(node_id, Counter())[names[replica_id]] += 1
    there = {node_id: dict(counts) for node_id, counts in to.items()}
    return Move(plan.node_id, there, plan.load_bytes, plan.saves)


def _kept(found: "Survey") -> list[Kept]:
    replicas = {node.id: len(node.replicas) for node in found.outlook.fleet.nodes}
    return [
        Kept(one.node_id, replicas[one.node_id], one.outcome, one.reason)
        for one in found.outlook.verdicts
    ]


def _parts(report: Report) -> "list[RenderableType]":
    saved = report.cost_now - report.cost_then
    sums = f"{report.nodes_now} worker nodes in use, {report.nodes_then} would do"
    if saved:
        sums += f": {100 * saved / report.cost_now:.0f} % of their cost saved"
    moves = table(
        ("EMPTY", "ITS REPLICAS GO TO", "LOAD", "SAVES"),
        map(_move_cells, report.moves),
        right="LOAD SAVES",
    )
    kept = table(
        ("NODE", "REPLICAS", "STAYS", ""),
        ((one.node_id[:_SHORT], str(one.replicas), one.outcome, one.reason) for one in report.kept),
        right="REPLICAS",
    )
    parts: list[RenderableType] = [sums, ""]
    if report.moves:
        parts += [moves, ""]
    return [*parts, kept, "", *_who(report)]


def _move_cells(move: Move) -> tuple[str, ...]:
    from weightstream.settings import format_bytes

    lines = [
        f"{node_id[:_SHORT]}: " + ", ".join(f"{n} {name}" for name, n in counts.items())
        for node_id, counts in move.to.items()
    ]
    load = format_bytes(move.load_bytes) if move.load_bytes else ""
    return move.node_id[:_SHORT], "\n".join(lines), load, f"{move.saves:g}"


def _who(report: Report) -> list[str]:
    """Say who would move it, and what keeps them."""
    if report.why_drain:
        lines = [f"nodes would be drained from outside (--now, --watch): {report.why_drain}"]
    else:
        lines = ["Serve's controller compacts"]
    if report.state is not None:
        lines.append(f"the controller: {_said(report.state)}")
        if report.state.failures:
            state = report.state
            lines.append(f"failures in a row: {state.failures}; the last: {state.failure}")
    if report.lease_holder:
        lines.append(f"{report.lease_holder} drains nodes")
    if report.unrest:
        lines.append(f"nothing moves at the moment: {report.unrest}")
    return lines


def _said(state: "State") -> str:
    node = f" {state.node_id[:_SHORT]}" if state.node_id else ""
    return f"{state.phase}{node}: {state.text}"


def _now(cli: Cli) -> int:
    from weightstream.serve_integration.compaction.compactor import compact_now

    _hush()
    teller = _Teller(cli)
    state = compact_now(_until_signal(), teller)
    settled = state.phase == "settled"
    outcome = state.text if settled else state.failure or state.text
    cli.emit(state, f"nodes emptied: {teller.emptied}; {outcome}")
    return 0 if settled else ClusterError.exit_code


def _watch(cli: Cli) -> int:
    from weightstream.serve_integration.compaction.compactor import watch

    _hush()
    watch(_until_signal(), _Teller(cli))
    cli.note("a node that drains goes on draining")
    return 0


def _hush() -> None:
    """Keep what the drain engine tells the controller's log, too, off the terminal."""
    import ray.serve  # noqa: F401 (sets the level of its log when it is imported)

    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _until_signal() -> threading.Event:
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    return ended


class _Teller:
    """Says on stderr what a compactor thinks, once for each thought."""

    def __init__(self, cli: Cli) -> None:
        self._cli = cli
        self._last = ""
        self._first: int | None = None
        self.emptied = 0
        """Nodes since the first word."""

    def __call__(self, state: "State") -> None:
        """Tell of a state, if it is news; seconds that count down are none."""
        if self._first is None:
            self._first = state.emptied
        self.emptied = state.emptied - self._first
        gist = re.sub(r"\d+ s ", "", _said(state))
        if gist != self._last:
            self._last = gist
            self._cli.note(_said(state))
