"""`weightstream serve up`, `down`, `warm`, `status`: the agents of a Ray cluster's nodes."""

import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table
from weightstream.cli.progress import Meter
from weightstream.cli.serve.connecting import Address, connected
from weightstream.errors import ClusterError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.cachefs.agent.held import Held
    from weightstream.serve_integration.compaction.ledger import State
    from weightstream.serve_integration.nodes import NodeProgress, NodeReport, Warming
    from weightstream.serve_integration.nodes.overview import (
        AgentState,
        NodeOverview,
    )

_SHORT = 12  # characters of a node's id that a person reads
_LOOK_EVERY_S = 0.1
_ENDS_S = 40.0  # an agent that says nothing is given up after 30


@dataclass(frozen=True, slots=True)
class UpRow:
    """One node, without its agent's token."""

    node_id: str
    host: str
    way: str
    api: str
    pid: int
    error: str


@dataclass(frozen=True, slots=True)
class Status:
    """A cluster, and what its compactor thinks."""

    tracker: str
    models: Mapping[str, int]
    nodes: "tuple[NodeOverview, ...]"
    compaction: "State | None"
    """None where Serve's controller runs without the plug-in."""
    lease_holder: str
    """Who drains nodes from outside of the controller."""


def up(
    cli: Cli,
    address: Address = "auto",
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Read this origin for peers before anybody here asked for it."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Bring up nodes that join, until SIGTERM.")
    ] = False,
) -> int:
    """Bring an agent up on every node of a Ray cluster; -o goes to each of them.

    Calling it again is fine: it starts what died, and what joined.
    """
    from weightstream.serve_integration import nodes

    settings = _agent_settings(cli)
    with connected(address):
        reports = nodes.up(allow or (), settings)
        _show_reports(cli, reports)
        if watch:
            _watch(cli)
    return _code(report.way == "failed" for report in reports)


def down(cli: Cli, address: Address = "auto") -> int:
    """End the agents that `up` started; those of systemd or a DaemonSet stay."""
    from weightstream.serve_integration import nodes

    with connected(address):
        reports = nodes.down()
    _show_reports(cli, reports)
    return _code(report.way == "failed" for report in reports)


def warm(
    cli: Cli,
    what: Annotated[
        list[str], typer.Argument(metavar="URI|APP/DEPLOYMENT...", help="What nodes shall hold.")
    ],
    node: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="A node, by the beginning of its id; else all."),
    ] = None,
    address: Address = "auto",
) -> int:
    """Have nodes bring models into their stores, from each other where they can."""
    from weightstream.serve_integration import nodes

    with connected(address):
        where = None if node is None else [_node_id(one) for one in node]
        uris = [uri for one in what for uri in _uris(one)]
        warming = nodes.warm(uris, where)
        with Meter(cli, what[0] if len(what) == 1 else f"{len(what)} models") as meter:
            _follow(warming, meter)
        rows = list(warming.progress().values())
    shown = table(("NODE", "", "BYTES", "FROM", ""), map(_warm_cells, rows), right="BYTES")
    cli.emit(rows, shown if rows else "no node has an agent: `weightstream serve up`")
    return _code(row.state in ("failed", "cancelled") for row in rows)


def status(cli: Cli, address: Address = "auto") -> None:
    """Show nodes, replicas, agents, what each node holds of each model, what the compactor thinks.

    A node holds of a model what its agent says: nothing is shown where there is none.
    """
    from weightstream.serve_integration import nodes
    from weightstream.serve_integration.compaction.ledger import lease_holder, read_state

    with connected(address):
        overview, state, holder = nodes.cluster_status(), read_state(), lease_holder()
    found = Status(overview.tracker, overview.models, overview.nodes, state, holder)
    cli.emit(found, *_status_parts(found))


def _agent_settings(cli: Cli) -> dict[str, str]:
    """Return what goes to the agents, once it is known to be good; -v and -q are this command's."""
    _ = cli.settings
    given = {name: str(value) for name, value in cli.overrides().items()}
    if cli.flags.verbose or cli.flags.quiet:
        given.pop("log_level", None)
    return given


def _show_reports(cli: Cli, reports: "Sequence[NodeReport]") -> None:
    rows = [_row(report) for report in reports]
    cells = ((row.node_id[:_SHORT], row.host, row.way, row.api, row.error) for row in rows)
    cli.emit(rows, table(("NODE", "HOST", "AGENT", "API", ""), cells))


def _row(report: "NodeReport") -> UpRow:
    agent = report.agent
    api, pid = (agent.api, agent.pid) if agent is not None else ("", 0)
    return UpRow(report.node_id, report.host, report.way, api, pid, report.error)


def _watch(cli: Cli) -> None:
    from weightstream.serve_integration import nodes

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    cli.note("watching for nodes that join")
    nodes.watch(stop, lambda reports: _show_reports(cli, reports))


def _code(bad: Iterable[bool]) -> int:
    return ClusterError.exit_code if any(bad) else 0


def _uris(text: str) -> tuple[str, ...]:
    from weightstream.serve_integration.nodes.warming import uris_of
    from weightstream.serve_integration.registry import Deployment

    if "://" in text:
        return (text,)
    app, separator, name = text.partition("/")
    if not separator or not app or not name or "/" in name:
        raise UsageError(f"{text!r} is neither a URI (a path is file:///...) nor APP/DEPLOYMENT")
    return uris_of(Deployment(app, name))


def _node_id(beginning: str) -> str:
    from weightstream.serve_integration.nodes.tasks import alive_nodes

    found = [one for one in alive_nodes() if one.startswith(beginning)]
    if len(found) != 1:
        raise UsageError(f"{len(found)} nodes that live have an id that begins with {beginning!r}")
    return found[0]


def _follow(warming: "Warming", meter: Meter) -> None:
    """Show how far all nodes are together; Ctrl-C has the agents stop, too."""
    try:
        while not warming.wait(_LOOK_EVERY_S):
            found = warming.progress().values()
            meter.advance(
                sum(one.bytes_done for one in found), sum(one.bytes_total for one in found)
            )
    except KeyboardInterrupt:
        warming.cancel()
        warming.wait(_ENDS_S)
        raise


def _warm_cells(row: "NodeProgress") -> tuple[str, ...]:
    from weightstream.settings import format_bytes

    total = sum(row.by_source.values())
    shares = (f"{name} {100 * n // total} %" for name, n in row.by_source.items() if n)
    done = format_bytes(row.bytes_done)
    return row.node_id[:_SHORT], row.state, done, ", ".join(shares), row.reason


def _status_parts(found: Status) -> "list[RenderableType]":
    headers = ("NODE", "HOST", "RAY", "REPLICAS", "AGENT", "HELD", "COMPACTOR")
    thoughts = _thoughts(found.compaction)
    shown = table(headers, (_node_cells(node, thoughts) for node in found.nodes))
    parts: list[RenderableType] = [shown, "", f"tracker: {found.tracker or 'none'}"]
    parts += [f"compaction: {line}" for line in _compaction_lines(found)]
    if not found.models:
        parts.append("no replica has said yet what it loads")
    return parts


def _thoughts(state: "State | None") -> dict[str, str]:
    """Return what the compactor thought of each node when it last looked, by the node's id."""
    if state is None:
        return {}
    said = {node: f"{outcome}: {why}" if why else outcome for node, outcome, why in state.verdicts}
    return said | ({state.node_id: state.phase} if state.node_id else {})


def _compaction_lines(found: Status) -> list[str]:
    state = found.compaction
    if state is None:
        lines = ["off: Serve's controller runs without the plug-in"]
    else:
        lines = [f"{state.phase}{': ' if state.text else ''}{state.text}"]
    if state is not None and (state.emptied or state.failures):
        lines.append(f"{state.emptied} nodes emptied, {state.failures} failures in a row")
    if found.lease_holder:
        lines.append(f"nodes are drained by {found.lease_holder}")
    return lines


def _node_cells(node: "NodeOverview", thoughts: Mapping[str, str]) -> tuple[str, ...]:
    replicas = "\n".join(f"{count} {name}" for name, count in node.replicas.items())
    host = f"{node.host} (head)" if node.is_head else node.host
    held = "\n".join(map(_held_cell, node.held))
    name, ray, agent = node.node_id[:_SHORT], node.status.lower(), _agent_cell(node.agent)
    return name, host, ray, replicas, agent, held, thoughts.get(node.node_id, "")


def _agent_cell(agent: "AgentState") -> str:
    found = "" if agent.is_ours or agent.state == "none" else " (found)"
    detail = f" {agent.detail}" if agent.detail else ""
    return f"{agent.state}{found}{detail}"


def _held_cell(held: "Held") -> str:
    from weightstream.settings import format_bytes

    name = held.uri.rstrip("/").rpartition("/")[2]
    whole = held.files == held.complete_files and held.held_bytes == held.total_bytes
    if whole and held.total_bytes:
        return f"{name} {format_bytes(held.held_bytes)}"
    if not held.held_bytes:
        return f"{name} nothing"
    return f"{name} {format_bytes(held.held_bytes)} of {format_bytes(held.total_bytes)}"
