"""`weightstream serve standby`: what waits for the next replicas, and to keep it waiting."""

import signal
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table
from weightstream.cli.serve.connecting import Address, connected

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.serve_integration.standby.check import Deployments, Probe
    from weightstream.serve_integration.standby.processes import Standby


@dataclass(frozen=True, slots=True)
class Report:
    """What the command found."""

    nodes: "list[Standby]"
    probes: "list[Probe]"
    deployments: "Deployments"


def standby(
    cli: Cli,
    processes: Annotated[
        int, typer.Option(min=0, help="How many shall wait on each node with torch imported.")
    ] = 0,
    watch: Annotated[
        bool, typer.Option("--watch", help="Replace what is used, until SIGTERM.")
    ] = False,
    address: Address = "auto",
) -> None:
    """Show what waits for the next replicas on each node; have processes wait."""
    with connected(address):
        report = look(processes)
        cli.emit(report, *_parts(report))
        for line in hints(report):
            cli.note(line)
        if watch and processes:
            _watch(cli, processes)


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


def _parts(report: Report) -> "list[RenderableType]":
    by_node = {probe.node_id: probe for probe in report.probes}
    rows = [_row(node, by_node[node.node_id]) for node in report.nodes]
    return [table(["node", "idle", "starting", "imported ahead", "MiB each"], rows, "idle")]


def _row(node: "Standby", probe: "Probe") -> list[str]:
    lacking = f"not {', '.join(probe.missing)}" if probe.missing else "yes"
    mib = f"{probe.private_bytes / 2**20:.0f}"
    return [node.node_id[:8], str(node.idle), str(node.starting), node.problem or lacking, mib]


def _watch(cli: Cli, processes: int) -> None:
    from weightstream.serve_integration.standby.processes import Keeper

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    cli.note(f"{processes} processes wait on each node")
    with Keeper(processes) as keeper:
        keeper.run(ended)
