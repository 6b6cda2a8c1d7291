"""Chunks change hands in a simulated mesh; see `weightstream.p2p.exchange.taking`."""

from typing import TYPE_CHECKING

from weightstream.p2p.schedule import givers

if TYPE_CHECKING:
    from weightstream.bench.swarm_sim.node import Node


def take(node: "Node") -> int | None:
    """Take over a chunk that another node has not begun; return which. The asking takes no time."""
    scenario = node.crowd.scenario
    late = node.crowd.homes.starts_at(node.name)
    if scenario.fan_out is not None or late or not scenario.taking:
        return None
    lacking = (c for c in range(node.first_missing, scenario.chunks) if not node.got[c])
    for name in givers(node.view(), lacking, lambda name: name not in node.spent):
        home = node.crowd.by_name[name]
        chunk = None if home.dead else _give(home, node)
        if chunk is not None:
            node.moved[chunk] = node.name
            return chunk
        node.spent.add(name)
    return None


def _give(home: "Node", taker: "Node") -> int | None:
    for chunk in range(home.first_missing, home.crowd.scenario.chunks):
        if home.crowd.homes.home(chunk) == home.name and _is_free(home, chunk):
            home.moved[chunk] = taker.name
            _send_on(home, chunk, taker)
            return chunk
    return None


def _is_free(home: "Node", chunk: int) -> bool:
    fetch = home.fetches.get(chunk)
    begun = home.got[chunk] or (fetch is not None and fetch.source is not None)
    return not begun and chunk not in home.moved


def _send_on(home: "Node", chunk: int, taker: "Node") -> None:
    """Send whoever waits at the home to the taker, the home itself as well."""
    home.next_peer = home.first_missing
    for flow in home.asking.pop(chunk, []):
        fetch = flow.target.fetches.get(chunk)
        if flow.target is not taker and fetch is not None and fetch.flow is flow:
            flow.target.redirected(fetch, flow, taker.name)
    mine = home.fetches.get(chunk)
    if mine is not None:
        home.ask(mine, taker.name)
