"""A simulated crowd from its first request to its last chunk."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

from weightstream.bench.swarm_sim.fetches import Origin
from weightstream.bench.swarm_sim.network import Link, Network
from weightstream.bench.swarm_sim.node import Node
from weightstream.bench.swarm_sim.scenario import Scenario
from weightstream.p2p.schedule import Homes, late_start, standing

_PATIENCE = 40.0
"""A crowd that is not done after this many bounds is given up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a scenario; times are from each node's begin, the dead left out."""

    scenario: Scenario
    finished: int
    lived: int
    last_s: float
    median_s: float
    bound_s: float
    times_bound: float
    """The slowest node's time by the crowd's bound; nodes that were slowed on purpose left out."""
    times_own: float
    """The worst node's time by its own bound: more where good links wait for bad ones."""
    egress: float
    """What the origin sent, in blobs."""
    events: int
    rates_s: tuple[float, ...]
    """Every living node's time, sorted."""


class Crowd:
    """All nodes and what they share: the network, and a view of who is in."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.network = Network()
        piece = scenario.piece_bytes
        self.origin = Origin(Link(scenario.origin_bytes_s / piece))
        self.down: frozenset[str] = frozenset()
        self._bounds_s = scenario.bounds_s()
        self._draw = random.Random(f"{scenario.seed} luck")
        self.nodes = [self._node(i, rate / piece) for i, rate in enumerate(scenario.rates())]
        self.by_name: Mapping[str, Node] = {node.name: node for node in self.nodes}
        self.zones: Mapping[str, str] = (
            {n.name: str(n.zone) for n in self.nodes} if scenario.zones > 1 else {}
        )
        self._borders = self._make_borders()
        self.starts = {node.name: 0 for node in self.nodes}
        """By node of the crowd: the first chunk that it may be home of."""
        self.homes = self._homes()
        self._left = 0

    def run(self) -> Outcome:
        """Let the crowd load."""
        self._plan()
        self.network.run(_PATIENCE * max(self._bounds_s))
        return self._outcome()

    # What nodes call

    def path(self, source: Node, target: Node) -> tuple[Link, ...]:
        """Return the links between two nodes."""
        if source.zone == target.zone or not self._borders:
            return (source.up, target.down)
        return (
            source.up,
            self._borders[source.zone][0],
            self._borders[target.zone][1],
            target.down,
        )

    def joined(self, node: Node) -> None:
        """Take a node in: it hears what everybody has, everybody hears of it."""
        scenario = self.scenario
        if node.name not in self.homes.order:
            inside = [other for other in self.nodes if other.name in self.starts]
            begun = 1 + max((other.position() for other in inside), default=-1)
            first = late_start(self.starts.values(), scenario.chunks)
            self.starts[node.name] = begun if scenario.late_homes else first
            self.homes = self._homes()
            for other in inside:
                other.look_back()
        if self.network.now_s > 0 or scenario.warm:
            node.holders = {
                chunk: frozenset(n.name for n in self.nodes if n is not node and n.has(chunk))
                for chunk in range(scenario.chunks)
            }
            node.forget_view()

    def _homes(self) -> Homes:
        order = standing("blob", self.starts)
        starts = tuple(self.starts[name] for name in order)
        return Homes(order, starts if any(starts) else ())

    def finished(self, node: Node) -> None:
        """Count; the end of the last one is the end."""
        if self.starts.get(node.name):
            self.starts[node.name] = 0  # it has all of it: nobody is nearer to it than others
            self.homes = self._homes()
            for other in self.nodes:
                other.look_back()
        self._left -= 1
        if self._left == 0:
            self.network.stop()

    def hear_dead(self, node: Node) -> None:
        """Everybody knows: its heartbeat is missing."""
        self.down |= {node.name}
        for other in self.nodes:
            other.forget_view()
            other.look_back()
            other.go_on()

    # Making it

    def _node(self, i: int, rate: float) -> Node:
        scenario = self.scenario
        zone = i * scenario.zones // scenario.nodes
        cap = scenario.client_bytes_s
        if i < scenario.starved:
            cap = scenario.origin_bytes_s / scenario.nodes / 10
        client = Link(cap / scenario.piece_bytes) if cap is not None else None
        return Node(self, f"node{i:05d}", zone, rate, client)

    def _make_borders(self) -> list[tuple[Link, Link]]:
        scenario = self.scenario
        if scenario.zones == 1:
            return []
        rates = [0.0] * scenario.zones
        for node in self.nodes:
            rates[node.zone] += node.up.rate * scenario.cross_share
        return [(Link(rate), Link(rate)) for rate in rates]

    def _plan(self) -> None:
        scenario, after = self.scenario, self.network.after
        bound_s = max(self._bounds_s)
        for node in self.nodes[: scenario.warm]:
            node.got = [scenario.pieces] * scenario.chunks
        starting = self.nodes[scenario.warm :]
        self._left = len(starting)
        late = self._some(scenario.joining)
        begins = {
            node.name: self._draw.uniform(0, bound_s) if node in late else begin_s
            for node, begin_s in zip(starting, scenario.begins(), strict=False)
        }
        first = [n.name for n in self.nodes if begins.get(n.name, 0.0) == 0.0]
        self.starts = dict.fromkeys(first, 0)
        if scenario.warm:
            self.starts |= {n.name: scenario.chunks for n in starting if n.name in self.starts}
        self.homes = self._homes()
        for node in starting:
            after(begins[node.name], node.begin)
            if scenario.slow_detected:
                after(begins[node.name] + 0.25 * self._draw.random(), node.look)
        for node in self._some(scenario.dying):
            after(self._draw.uniform(0, bound_s), node.die)
        for node in self.nodes[: scenario.slowed]:
            after(bound_s / 3, node.turn_slow)

    def _some(self, share: float) -> list[Node]:
        return self._draw.sample(self.nodes, round(share * len(self.nodes)))

    def _outcome(self) -> Outcome:
        lived = [n for n in self.nodes[self.scenario.warm :] if not n.dead]
        done = [n for n in lived if n.done_s is not None and n.begun_s is not None]
        times = {n.name: (n.done_s or 0.0) - (n.begun_s or 0.0) for n in done}
        bounds = {n.name: b for n, b in zip(self.nodes, self._bounds_s, strict=True)}
        fast = [n for n in done if not n.slowed]
        ordered = sorted(times.values())
        return Outcome(
            self.scenario,
            len(done),
            len(lived),
            max(ordered, default=0.0),
            ordered[len(ordered) // 2] if ordered else 0.0,
            max(self._bounds_s),
            max((times[n.name] for n in fast), default=0.0) / max(self._bounds_s),
            max((times[n.name] / bounds[n.name] for n in fast), default=0.0),
            self.origin.sent_pieces / (self.scenario.pieces * self.scenario.chunks),
            self.network.events,
            tuple(ordered),
        )
