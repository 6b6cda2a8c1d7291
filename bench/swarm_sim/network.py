"""A network of links on which chunks travel in pieces.

Every link serves the flows that cross it in turn, one piece each, and a flow has few pieces on the
way at a time. Round robin with such a window at every hop converges to the max-min fair rates
(Hahne, 1991), which is what long-lived TCP flows of one round-trip time share out among
themselves. So one event per piece and hop stands for a whole fluid model, and nothing has to be
solved anew when a flow begins or ends.

Time on the wire is left out: a request costs a round trip, and pieces follow each other behind it.
"""

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

WINDOW_PIECES = 2
"""Pieces of one flow on the way: one on the wire, one behind it."""


class Link:
    """One direction of a wire; `rate` is in pieces per second."""

    __slots__ = ("busy_s", "flow", "hop", "queue", "rate")

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.busy_s = 0.0
        self.queue: deque[tuple[Flow, int]] = deque()
        self.flow: Flow | None = None
        self.hop = 0


class Flow:
    """One chunk on its way from `source` over `path`; `delivered` is told of every piece."""

    __slots__ = (
        "chunk",
        "closed",
        "delivered",
        "flying",
        "heard",
        "next",
        "path",
        "source",
        "target",
        "waiting",
    )

    def __init__(
        self,
        source: Any,
        target: Any,
        chunk: int,
        path: tuple[Link, ...],
        delivered: "Delivered",
    ) -> None:
        self.chunk = chunk
        self.source = source
        self.target = target
        self.path = path
        self.delivered = delivered
        self.next = 0
        self.flying = 0
        self.waiting = [0] * len(path)
        self.closed = False
        self.heard = False


Delivered = Callable[[Flow], None]


class Network:
    """The clock, and everything that happens at a time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Link | Callable[[], None]]] = []
        self._count = 0

    def after(self, wait_s: float, do: Callable[[], None]) -> None:
        """Do something later."""
        self._push(self.now_s + wait_s, do)

    def offer(self, flow: Flow, pieces: int) -> None:
        """Say that the source has the first `pieces` pieces: what may go, goes."""
        while flow.next < pieces and flow.flying < WINDOW_PIECES and not flow.closed:
            flow.next += 1
            flow.flying += 1
            self._arrive(flow, 0)

    def run(self, until_s: float) -> bool:
        """Let things happen; False when time was up before nothing more was to happen."""
        heap, pop = self._heap, heapq.heappop
        while heap:
            self.now_s, _, what = pop(heap)
            if self.now_s > until_s:
                return False
            self.events += 1
            if isinstance(what, Link):
                self._served(what)
            else:
                what()
        return True

    def stop(self) -> None:
        """Let nothing more happen."""
        self._heap.clear()

    def _push(self, at_s: float, what: Link | Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at_s, self._count, what))

    def _arrive(self, flow: Flow, hop: int) -> None:
        link = flow.path[hop]
        flow.waiting[hop] += 1
        if flow.waiting[hop] == 1:
            link.queue.append((flow, hop))
            if link.flow is None:
                self._serve(link)

    def _serve(self, link: Link) -> None:
        queue = link.queue
        while queue:
            flow, hop = queue.popleft()
            if flow.closed:
                continue
            flow.waiting[hop] -= 1
            if flow.waiting[hop]:
                queue.append((flow, hop))
            link.flow, link.hop = flow, hop
            took_s = 1.0 / link.rate
            link.busy_s += took_s
            self._push(self.now_s + took_s, link)
            return
        link.flow = None

    def _served(self, link: Link) -> None:
        flow, hop = link.flow, link.hop
        assert flow is not None
        self._serve(link)
        if flow.closed:
            return
        if hop + 1 < len(flow.path):
            self._arrive(flow, hop + 1)
        else:
            flow.flying -= 1
            flow.delivered(flow)
