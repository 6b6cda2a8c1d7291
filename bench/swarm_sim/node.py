"""The nodes of a simulated crowd: each follows the schedule as an exchange does."""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

from weightstream.bench.swarm_sim.fetches import Fetch, Origin, flow_broken
from weightstream.bench.swarm_sim.network import Flow, Link, Network
from weightstream.bench.swarm_sim.paces import JUDGED_S, Asked, slow_ones
from weightstream.bench.swarm_sim.scenario import Scenario
from weightstream.p2p.exchange.sinks import WORTH_TIMES
from weightstream.p2p.schedule import ORIGIN, Homes, View, acting_home, givers, is_slow, route

_JOIN_S = 0.08
"""An agent waits this long for others to begin with it."""
_LOOK_S = 0.25


class World(Protocol):
    """What a node knows of everybody else, and may do to them."""

    scenario: Scenario
    network: Network
    origin: Origin
    homes: Homes
    down: frozenset[str]
    zones: Mapping[str, str]
    by_name: Mapping[str, "Node"]

    def path(self, source: "Node", target: "Node") -> tuple[Link, ...]:
        """Return the links between two nodes."""
        ...

    def joined(self, node: "Node") -> None:
        """Take a node in."""
        ...

    def finished(self, node: "Node") -> None:
        """Hear that a node has everything."""
        ...

    def hear_dead(self, node: "Node") -> None:
        """Have everybody know that a node is dead."""
        ...


class Node:
    """One agent and the load that it runs."""

    def __init__(
        self, crowd: World, name: str, zone: int, rate: float, client: Link | None
    ) -> None:
        self.crowd = crowd
        self.name = name
        self.zone = zone
        self.up, self.down = Link(rate), Link(rate)
        self.client = client
        self.got = [0] * crowd.scenario.chunks
        self.fetches: dict[int, Fetch] = {}
        self.asking: dict[int, list[Flow]] = {}
        self.gate: deque[int] = deque()
        self.streams = 0
        self.open = 0
        self.complete = 0
        self.first_missing = 0
        self.next_own = 0
        self.next_peer = 0
        self.holders: Mapping[int, frozenset[str]] = {}
        self.local_down: set[str] = set()
        self.slow: frozenset[str] = frozenset()
        self.moved: dict[int, str] = {}
        """By chunk: who took it over from its home, as far as this node was told."""
        self.spent: set[str] = set()
        """Homes that have nothing left to give away."""
        self.paces: dict[str, Asked] = {}
        self.begun_s: float | None = None
        self.done_s: float | None = None
        self.loads = False
        self.dead = False
        self.slowed = False
        self._view: View | None = None

    # What it decides by

    def view(self) -> View:
        """Return what the schedule decides by; made anew when something changed."""
        crowd = self.crowd
        view = self._view
        if view is None or view.homes is not crowd.homes:
            down = crowd.down | self.local_down if self.local_down else crowd.down
            fan_out = crowd.scenario.fan_out
            bulk = fan_out is None and crowd.homes.starts_at(self.name) == 0
            slow = frozenset[str]() if bulk else self.slow  # see `Crowd.view` of the exchange
            view = View(
                self.name, crowd.homes, self.holders, down, slow, crowd.zones, fan_out, self.moved
            )
            self._view = view
        return view

    def forget_view(self) -> None:
        """Have it made anew."""
        self._view = None

    # What it wants

    def begin(self) -> None:
        """Tell everybody; load once the others have answered."""
        self.begun_s = self.crowd.network.now_s
        self.crowd.network.after(_JOIN_S if self.begun_s else 0.0, self._begin)

    def _begin(self) -> None:
        self.crowd.joined(self)
        self.loads = True
        self.go_on()

    def go_on(self) -> None:
        """Fill the gate's streams and the window."""
        if self.dead:
            return
        scenario = self.crowd.scenario
        while self.streams < scenario.origin_streams and self._read_own():
            pass
        if not self.loads or self.done_s is not None:
            return
        while self.open < scenario.window_chunks and self._ask_next():
            pass

    def look_back(self) -> None:
        """Homes have changed: what was another's may be one's own, and the reverse.

        What is asked for and has not begun to come is asked anew, or nodes that asked at different
        times could wait for each other in a circle.
        """
        self.next_own = self.next_peer = self.first_missing
        for fetch in tuple(self.fetches.values()):
            if fetch.flow is None or not fetch.relayed or self.dead or self.got[fetch.chunk]:
                continue
            if fetch.source != route(self.view(), fetch.chunk).asks[0]:
                self._close(fetch, fetch.flow)
                fetch.tried.clear()
                self.bring(fetch)

    def _read_own(self) -> bool:
        while self.gate:
            fetch = self.fetches.get(self.gate.popleft())
            if fetch is not None and fetch.source is None:
                self._read(fetch)
                return True
        if not self.loads:
            return False
        scenario = self.crowd.scenario
        last = scenario.chunks
        if scenario.ahead_chunks is not None:
            last = min(last, self.first_missing + scenario.ahead_chunks)
        while self.next_own < last:
            chunk = self.next_own
            self.next_own += 1
            if self._lacks(chunk) and route(self.view(), chunk).is_own:
                self._read(self._board(chunk, planned=False))
                return True
        return self.next_own >= scenario.chunks and self._take()

    # Taking over, as `weightstream.p2p.exchange.taking` does; the asking takes no time

    def _take(self) -> bool:
        scenario = self.crowd.scenario
        late = self.crowd.homes.starts_at(self.name)
        if scenario.fan_out is not None or late or not scenario.taking:
            return False
        lacking = (c for c in range(self.first_missing, scenario.chunks) if not self.got[c])
        for name in givers(self.view(), lacking, lambda name: name not in self.spent):
            chunk = self.crowd.by_name[name].give(self)
            if chunk is not None:
                self._taken(chunk)
                return True
            self.spent.add(name)
        return False

    def _taken(self, chunk: int) -> None:
        self.moved[chunk] = self.name
        fetch = self.fetches.get(chunk)
        if fetch is not None and fetch.flow is not None:
            self._close(fetch, fetch.flow)
        self._read(fetch or self._board(chunk, planned=False))

    def give(self, taker: "Node") -> int | None:
        """Give away the first chunk of its own that it has not begun."""
        view = self.view()
        for chunk in range(self.first_missing, self.crowd.scenario.chunks):
            if acting_home(view, chunk) == self.name and self._is_free(chunk):
                self.moved[chunk] = taker.name
                self._send_on(chunk, taker)
                return chunk
        return None

    def _is_free(self, chunk: int) -> bool:
        fetch = self.fetches.get(chunk)
        begun = self.got[chunk] or (fetch is not None and fetch.source is not None)
        return not self.dead and not begun and chunk not in self.moved

    def _send_on(self, chunk: int, taker: "Node") -> None:
        """Send whoever waits here to the taker, and ask it as well."""
        self.next_peer = self.first_missing
        for flow in self.asking.pop(chunk, []):
            fetch = flow.target.fetches.get(chunk)
            if flow.target is not taker and fetch is not None and fetch.flow is flow:
                flow.target.redirected(fetch, flow, taker.name)
        mine = self.fetches.get(chunk)
        if mine is not None:
            self.ask(mine, taker.name)

    def _ask_next(self) -> bool:
        scenario = self.crowd.scenario
        if scenario.per_peer is not None:
            self.next_peer = self.first_missing
        last = min(scenario.chunks, self.next_peer + 4 * scenario.window_chunks)
        while self.next_peer < last:
            chunk = self.next_peer
            self.next_peer += 1
            if self._lacks(chunk) and self._may_ask(chunk):
                self.open += 1
                self.bring(self._board(chunk, planned=True))
                return True
        return False

    def _may_ask(self, chunk: int) -> bool:
        found = route(self.view(), chunk)
        if found.is_own:
            return False
        most = self.crowd.scenario.per_peer
        if most is None:
            return True
        return sum(f.source == found.asks[0] for f in self.fetches.values()) < most

    def position(self) -> int:
        """Return the last chunk that is here or coming from the origin; -1 for none."""
        return max((c for c in range(len(self.got)) if self.has(c)), default=-1)

    def has(self, chunk: int) -> bool:
        """Say that a chunk is here, or coming from the origin."""
        fetch = self.fetches.get(chunk)
        return not self._lacks(chunk) and (fetch is None or fetch.source == ORIGIN)

    def _lacks(self, chunk: int) -> bool:
        return self.got[chunk] < self.crowd.scenario.pieces and chunk not in self.fetches

    def _board(self, chunk: int, planned: bool) -> Fetch:
        fetch = self.fetches[chunk] = Fetch(chunk, planned)
        return fetch

    # Bringing

    def _read(self, fetch: Fetch) -> None:
        """Read from the origin."""
        self.streams += 1
        fetch.source = ORIGIN
        origin = self.crowd.origin
        path = (origin.up, *((self.client,) if self.client else ()), self.down)
        self._start(fetch, Flow(origin, self, fetch.chunk, path, self._delivered))

    def bring(self, fetch: Fetch) -> None:
        """Ask the next peer, or queue at the own gate."""
        view = self.view()
        if fetch.left:
            view = replace(view, slow=view.slow | fetch.left)
        found = route(view, fetch.chunk)
        name = next((ask for ask in found.asks if ask not in fetch.tried), ORIGIN)
        fetch.relayed = name in found.relays
        fetch.insist = not fetch.relayed and name != self.crowd.homes.home(fetch.chunk)
        self.ask(fetch, name)

    def ask(self, fetch: Fetch, name: str) -> None:
        """Ask one peer."""
        fetch.tried.add(name)
        if name == ORIGIN:
            fetch.source = None
            self.gate.append(fetch.chunk)
            self.go_on()
            return
        fetch.source = name
        source = self.crowd.by_name[name]
        path = self.crowd.path(source, self)
        self._start(fetch, Flow(source, self, fetch.chunk, path, self._delivered))

    def _start(self, fetch: Fetch, flow: Flow) -> None:
        crowd = self.crowd
        fetch.flow, fetch.began_s = flow, crowd.network.now_s
        flow.next = self.got[fetch.chunk]
        crowd.network.after(crowd.scenario.rtt_s, partial(self._reached, fetch, flow))

    def _reached(self, fetch: Fetch, flow: Flow) -> None:
        """The request is with the source."""
        if flow.closed:
            return
        if isinstance(flow.source, Node):
            flow.source.asked(flow, fetch)
        else:
            self.crowd.network.offer(flow, self.crowd.scenario.pieces)

    def asked(self, flow: Flow, fetch: Fetch) -> None:
        """Give a chunk, as far as it is here; bring it when it is not."""
        if self.dead:
            self.crowd.network.after(
                self.crowd.scenario.silence_s, partial(flow_broken, flow, fetch)
            )
            return
        chunk = flow.chunk
        if self._lacks(chunk):
            found = route(self.view(), chunk)
            asker = flow.target
            willing = found.is_own or fetch.insist or fetch.relayed
            if not willing and found.asks[0] != asker.name:
                asker.redirected(fetch, flow, found.asks[0])
                return
            mine = self._board(chunk, planned=False)
            if fetch.relayed and not found.is_own:
                self.bring(mine)
            else:
                self.gate.append(chunk)
                self.go_on()
        elif self.waits_for(flow.target, chunk):
            self._insisted(self.fetches[chunk])
        self.asking.setdefault(chunk, []).append(flow)
        self.crowd.network.offer(flow, self.got[chunk])

    def waits_for(self, asker: "Node", chunk: int) -> bool:
        """Say that whoever asks for a chunk is, through others, asked for it."""
        fetch, seen = self.fetches.get(chunk), set[str]()
        while fetch is not None and fetch.source and fetch.source not in seen:
            seen.add(fetch.source)
            fetch = self.crowd.by_name[fetch.source].fetches.get(chunk)
        return asker.name in seen

    def _insisted(self, mine: Fetch) -> None:
        """Read what was asked of a peer that waits for us: an exchange sees that by the names of
        those through whom its peer waits."""
        if mine.flow is None:
            return
        self._close(mine, mine.flow)
        self.gate.append(mine.chunk)
        self.go_on()

    def redirected(self, fetch: Fetch, flow: Flow, name: str) -> None:
        """Hear that somebody else is the home."""
        self._close(fetch, flow)
        fetch.insist, fetch.relayed = True, False  # whoever is named has to
        if name == self.name or name in fetch.tried:
            self.bring(fetch)
        else:
            self.ask(fetch, name)

    def _delivered(self, flow: Flow) -> None:
        """One more piece is here."""
        crowd, chunk, source = self.crowd, flow.chunk, flow.source
        network = crowd.network
        pieces = crowd.scenario.pieces
        got = self.got[chunk] = self.got[chunk] + 1
        waiting = self.asking.get(chunk)
        if waiting:
            for other in waiting:
                network.offer(other, got)
        if isinstance(source, Node):
            if crowd.scenario.slow_detected:
                self._note_pace(source.name, flow)
            if got < pieces:
                network.offer(flow, source.got[chunk])
        else:
            crowd.origin.sent_pieces += 1
            if got < pieces:
                network.offer(flow, pieces)
        if got == pieces:
            self._landed(self.fetches.pop(chunk), flow)

    def _landed(self, fetch: Fetch, flow: Flow) -> None:
        self._close(fetch, flow)
        self.complete += 1
        self.asking.pop(fetch.chunk, None)
        if fetch.planned:
            self.open -= 1
        scenario = self.crowd.scenario
        got, pieces = self.got, scenario.pieces
        while self.first_missing < scenario.chunks and got[self.first_missing] == pieces:
            self.first_missing += 1
        if self.complete == scenario.chunks:
            self.done_s = self.crowd.network.now_s
            self.crowd.finished(self)
        self.go_on()

    def _close(self, fetch: Fetch, flow: Flow) -> None:
        flow.closed = True
        if fetch.source == ORIGIN:
            self.streams -= 1
        elif flow.heard and fetch.source is not None:
            self.paces[fetch.source].close(self.crowd.network.now_s)
        fetch.flow, fetch.source = None, None

    # What goes wrong

    def broken(self, fetch: Fetch, flow: Flow) -> None:
        """A source is gone: go on with another."""
        if self.dead or fetch.flow is not flow:
            return
        name = fetch.source or ""
        self._close(fetch, flow)
        self.local_down.add(name)
        self.forget_view()
        self._again(fetch)
        self.look_back()

    def _again(self, fetch: Fetch) -> None:
        if not self.crowd.scenario.resume and self.got[fetch.chunk]:
            self.got[fetch.chunk] = 0
            for flow in self.asking.pop(fetch.chunk, []):
                target = flow.target
                other = target.fetches.get(fetch.chunk)
                if other is not None and other.flow is flow:
                    target._close(other, flow)
                    target._again(other)
        self.bring(fetch)

    def look(self) -> None:
        """Give up who gives far less than the others; a timer of the exchange's sinks."""
        if self.dead or self.done_s is not None:
            return
        now_s = self.crowd.network.now_s
        paces = {name: asked.pace(now_s) for name, asked in self.paces.items()}
        slow = frozenset(slow_ones(paces))
        if slow != self.slow:
            self.slow = slow
            self.forget_view()
            self.look_back()
        if slow:
            for fetch in list(self.fetches.values()):
                flow, left = fetch.flow, 1 - self.got[fetch.chunk] / self.crowd.scenario.pieces
                if not flow or fetch.source not in slow or now_s - fetch.began_s < JUDGED_S:
                    continue
                if is_slow(paces, fetch.source, WORTH_TIMES / left):
                    fetch.left.add(fetch.source)
                    self._close(fetch, flow)
                    self._again(fetch)
        self.crowd.network.after(_LOOK_S, self.look)

    def die(self) -> None:
        """Fall silent."""
        self.dead = True
        crowd = self.crowd
        for fetch in self.fetches.values():
            if fetch.flow is not None:
                fetch.flow.closed = True
        for flows in self.asking.values():
            for flow in flows:
                fetch = flow.target.fetches.get(flow.chunk)
                if not flow.closed and fetch is not None and fetch.flow is flow:
                    flow.closed = True
                    crowd.network.after(crowd.scenario.silence_s, partial(flow_broken, flow, fetch))
        crowd.network.after(crowd.scenario.heard_s, partial(crowd.hear_dead, self))

    def turn_slow(self) -> None:
        """Have a tenth of the link from now on."""
        self.slowed = True
        self.up.rate /= 10
        self.down.rate /= 10

    def _note_pace(self, name: str, flow: Flow) -> None:
        """Count what a peer gave; the time before its first byte is not its own."""
        asked = self.paces.get(name)
        if asked is None:
            asked = self.paces[name] = Asked()
        if not flow.heard:
            flow.heard = True
            asked.open(self.crowd.network.now_s)
        asked.got_bytes += self.crowd.scenario.piece_bytes
