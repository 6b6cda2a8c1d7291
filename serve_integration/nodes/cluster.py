"""Agents on every node of a Ray cluster: up, down, and on nodes that join later."""

import secrets
import threading
from collections.abc import Callable, Iterable, Mapping

from weightstream.errors import ClusterError
from weightstream.serve_integration import registry
from weightstream.serve_integration.nodes import on_node
from weightstream.serve_integration.nodes.on_node import NodeReport
from weightstream.serve_integration.nodes.orders import Orders, note_orders, noted_orders
from weightstream.serve_integration.nodes.tasks import RayNode, alive_nodes, on_nodes
from weightstream.serve_integration.nodes.tasks import on_node as on_one_node
from weightstream.settings import load_settings

LIMIT_S = 150.0
"""For one node: a worker has to start, and then its agent."""

WATCH_EVERY_S = 5.0


def up(
    allow: Iterable[str] = (), settings: Mapping[str, str] | None = None
) -> tuple[NodeReport, ...]:
    """Bring an agent up on every node, and a tracker beside the head node; report node by node.

    May be called again and again: what runs as it should is kept, what died is started anew, what
    was started with other arguments too. An agent that somebody else started (systemd, a DaemonSet)
    is found in the node's run directory and used as it is.

    `allow` names origins that agents read for their peers before anybody on their node has asked
    for them; `settings` are `-o KEY=VALUE` of each agent. Where these name `peers`, no tracker is
    started; where they name a `cluster_secret_file`, it has to be on every node. weightstream must
    be installed there, outside of any runtime environment, which Ray removes some day.

    A node on which it fails says why in its report, and the others are up all the same. Raises
    `UsageError` for settings that cannot be, `ClusterError` when there is no tracker.
    """
    given = dict(settings or {})
    load_settings(given)
    nodes = alive_nodes()
    before = noted_orders()
    orders = Orders(tuple(allow), given)
    if "peers" not in given:
        orders = _with_tracker(orders, before, next(iter(nodes.values())))
    note_orders(orders)
    for node_id in registry.agents().keys() - nodes.keys():
        registry.forget_agent(node_id)
    return _bring_up(orders, nodes.values())


def ensure(node_ids: Iterable[str]) -> tuple[NodeReport, ...]:
    """Bring agents up on these nodes, where they have none, as the last `up` said.

    Does nothing after `down`, or where there was no `up`: nobody wants agents then.
    """
    orders, known, nodes = noted_orders(), registry.agents(), alive_nodes()
    wanted = [nodes[one] for one in node_ids if one in nodes and one not in known]
    return _bring_up(orders, wanted) if orders is not None and wanted else ()


def watch(
    stop: threading.Event,
    told: Callable[[tuple[NodeReport, ...]], None],
    every_s: float = WATCH_EVERY_S,
) -> None:
    """Bring nodes up as they join, until `stop` is set or somebody calls `down`."""
    while not stop.wait(every_s) and noted_orders() is not None:
        nodes = alive_nodes()
        for node_id in (agents := registry.agents()).keys() - nodes.keys():
            registry.forget_agent(node_id)
        if reports := ensure(nodes.keys() - agents.keys()):
            told(reports)


def down() -> tuple[NodeReport, ...]:
    """End the agents and the tracker that `up` started, also where that had failed half-way.

    On nodes that Ray has lost meanwhile agents run on; the next `up` there takes them over.
    """
    note_orders(None)
    nodes = alive_nodes()
    given = [(node.id, (node.id, node.host)) for node in nodes.values()]
    outcomes = on_nodes(on_node.take_down, given, LIMIT_S)
    for node_id in registry.agents():
        registry.forget_agent(node_id)
    registry.note("nodes/tracker", None)
    return tuple(
        one.result or NodeReport(one.node_id, nodes[one.node_id].host, "failed", None, one.error)
        for one in outcomes
    )


def tracker() -> str:
    """Return the address of the tracker that `up` started; empty when it started none."""
    orders = noted_orders()
    return "" if orders is None else orders.tracker


def _with_tracker(orders: Orders, before: Orders | None, head: RayNode) -> Orders:
    """Start the tracker, or see that it runs, where it was before if there was one."""
    secret_file = orders.settings.get("cluster_secret_file", "")
    secret = "" if secret_file else (before.secret if before else "") or secrets.token_hex(32)
    port = 0
    if before is not None and before.tracker:
        port = int(before.tracker.rpartition(":")[2])
    key = Orders(settings={"cluster_secret_file": secret_file}, secret=secret).key
    given = (head.host, port, key, secret, secret_file)
    port = on_one_node(on_node.bring_tracker_up, head.id, LIMIT_S, *given)
    host = f"[{head.host}]" if ":" in head.host else head.host
    return Orders(orders.allow, orders.settings, f"http://{host}:{port}", secret)


def _bring_up(orders: Orders, nodes: Iterable[RayNode]) -> tuple[NodeReport, ...]:
    hosts = {node.id: node.host for node in nodes}
    if not hosts:
        raise ClusterError("the cluster has no node that is alive")
    given = [(node_id, (orders, node_id, host)) for node_id, host in hosts.items()]
    reports = []
    for one in on_nodes(on_node.bring_up, given, LIMIT_S):
        report = one.result or NodeReport(
            one.node_id, hosts[one.node_id], "failed", None, one.error
        )
        if report.agent is not None:
            registry.note_agent(report.agent)
        else:
            registry.forget_agent(report.node_id)
        reports.append(report)
    return tuple(reports)
