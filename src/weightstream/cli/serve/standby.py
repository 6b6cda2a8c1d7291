"""`weightstream serve standby`: what waits for the next replicas, and to keep it waiting."""

import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table
from weightstream.cli.serve.connecting import Address, connected
from weightstream.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.serve_integration.standby.capacity import Holder, Holding, Step
    from weightstream.serve_integration.standby.check import Deployments, Probe
    from weightstream.serve_integration.standby.processes import Standby
    from weightstream.serve_integration.standby.schedule import Window

PROCESSES = "Processes that wait"
CAPACITY = "Nodes that wait"


@dataclass(frozen=True, slots=True)
class Report:
    """What the command found."""

    nodes: "list[Standby]"
    probes: "list[Probe]"
    deployments: "Deployments"


def standby(
    cli: Cli,
    processes: Annotated[
        int,
        typer.Option(min=0, help="How many, on each node.", rich_help_panel=PROCESSES),
    ] = 0,
    steps: Annotated[
        str,
        typer.Option(
            metavar="SCHEDULE",
            help="Steps to hold room for: `1` or `1, mon-fri 08:00-20:00=3`; local time.",
            rich_help_panel=CAPACITY,
        ),
    ] = "",
    step_size: Annotated[
        int, typer.Option(min=1, help="Replicas in a step.", rich_help_panel=CAPACITY)
    ] = 1,
    replica: Annotated[
        str,
        typer.Option(
            metavar="RESOURCES",
            help="What one replica needs: `CPU=1,GPU=1`.",
            rich_help_panel=CAPACITY,
        ),
    ] = "CPU=1",
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URI", help="Bring it to the nodes with room.", rich_help_panel=CAPACITY
        ),
    ] = None,
    release: Annotated[
        bool,
        typer.Option(
            "--release", help="Let go of every node that is held.", rich_help_panel=CAPACITY
        ),
    ] = False,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Keep it so until SIGTERM; then let go of the nodes."),
    ] = False,
    address: Address = "auto",
) -> None:
    """Show what waits for the next replicas; have processes and nodes wait.

    Without --watch, nodes are held until --release.
    """
    if release and steps:
        raise UsageError("--release lets go of what --steps would hold: give one of them")
    if model and not (steps and watch):
        raise UsageError("--model brings weights to nodes as they join: give --steps and --watch")
    plan = _plan(steps, step_size, replica) if steps else None
    with connected(address):
        if release:
            _release(cli)
            return
        holder = None if plan is None else _holder(plan, model or [])
        _show(cli, processes)
        if holder is not None and not watch:
            _say(cli, holder.refresh())
        if watch:
            _watch(cli, processes, holder)


def look(processes: int) -> Report:
    """Fill up, unless no deployment could use it, and look."""
    from weightstream.serve_integration.standby import check
    from weightstream.serve_integration.standby.processes import fill

    deployments = check.deployments()
    nodes = fill(0)
    probes = check.probe([node.node_id for node in nodes])
    if processes and not deployments.all_fresh:
        nodes = fill(processes)
    return Report(nodes, probes, deployments)


def hints(report: Report) -> list[str]:
    """Return what to change so that replicas start faster."""
    from weightstream.serve_integration.standby.check import start_lines

    lines = [
        f"{one.app}#{one.deployment} starts fresh processes ({one.why}); bake it into the image "
        "or the node's environment"
        for one in report.deployments.fresh
    ]
    if report.deployments.all_fresh:
        lines.append("no deployment could use a process that waits: none is started")
    if any(probe.missing for probe in report.probes):
        lines += ["some nodes do not import ahead; start Ray there like this:"]
        lines += [f"  {line}" for line in start_lines()]
    return lines


def _show(cli: Cli, processes: int) -> None:
    report = look(processes)
    cli.emit(report, *_parts(report))
    for line in hints(report):
        cli.note(line)


def _parts(report: Report) -> "list[RenderableType]":
    by_node = {probe.node_id: probe for probe in report.probes}
    rows = [_row(node, by_node[node.node_id]) for node in report.nodes if node.node_id in by_node]
    headers = ("NODE", "IDLE", "STARTING", "IMPORTED AHEAD", "MIB EACH")
    return [table(headers, rows, right="IDLE STARTING")]


def _row(node: "Standby", probe: "Probe") -> list[str]:
    lacking = f"not {', '.join(probe.missing)}" if probe.missing else "yes"
    mib = f"{probe.private_bytes / 2**20:.0f}"
    return [node.node_id[:12], str(node.idle), str(node.starting), node.problem or lacking, mib]


def _plan(steps: str, step_size: int, replica: str) -> "tuple[Step, tuple[Window, ...]]":
    from weightstream.serve_integration.standby.capacity import Step, parse_bundle
    from weightstream.serve_integration.standby.schedule import parse

    return Step(parse_bundle(replica), step_size), parse(steps)


def _holder(plan: "tuple[Step, tuple[Window, ...]]", models: list[str]) -> "Holder":
    from weightstream.serve_integration.standby.capacity import Holder

    return Holder(*plan, models)


def _release(cli: Cli) -> None:
    from weightstream.serve_integration.standby.capacity import release

    release()
    cli.note("no node is held; the autoscaler takes back what nobody uses")


def _say(cli: Cli, found: "Holding") -> None:
    fewer = "" if found.asked == found.wanted else f" of {found.wanted}, no more can be had"
    cli.note(f"replicas with room: {found.room} now; asked for: {found.asked}{fewer}")


def _watch(cli: Cli, processes: int, holder: "Holder | None") -> None:
    """Keep processes waiting on a thread, and nodes here, until a signal comes."""
    from weightstream.serve_integration.standby.processes import Keeper

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Keeper(processes) as keeper:
        thread = threading.Thread(target=keeper.run, args=(ended,), name="weightstream-standby")
        thread.start()
        cli.note(f"{processes} processes are kept waiting on each node")
        try:
            if holder is not None:
                holder.run(ended, lambda found: _say(cli, found))
            ended.wait()
        finally:
            ended.set()
            thread.join()
