"""A deployment in a made-up cluster: requests, slots, replicas that take time to start.

Replicas are alike and a request takes as long on any of them, so only the number of slots matters.
Requests wait in one queue, first come first served. A replica costs from when it is ordered until
it is given back; what runs on it then goes on to its end, and takes a slot of the others until it
is over. A replica starts warm where as many ran before, for then some node holds the model.
"""

import heapq
import math
from array import array
from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from weightstream.errors import UsageError
from weightstream.serve_integration.scaling.measured import expected_start_s
from weightstream.serve_integration.scaling.policy import Observed
from weightstream.serve_integration.scaling.simulate.reports import Reports
from weightstream.serve_integration.scaling.simulate.scalers import Scaler
from weightstream.serve_integration.scaling.simulate.traces import Request, Trace

if TYPE_CHECKING:
    from weightstream.serve_integration.registry import Warmth

_LEAD_S = 10.0
"""The clock starts this long before the first request."""
_POINTS = 2000
_LONGEST_S = 3600.0
"""How long after the last request a queue may take to empty."""
_TICK_S = 0.1
"""How often Serve's controller decides (RAY_SERVE_CONTROL_LOOP_INTERVAL_S)."""
_COARSE_S, _COARSE_TICK_S = 3 * 3600.0, 1.0
"""A trace longer than this is decided on once a second, so that a day takes half a minute."""
_MOST_S = 31 * 86400.0


@dataclass(frozen=True, slots=True)
class Service:
    """The deployment and its cluster."""

    slots: int
    """Requests that a replica takes at once."""
    start_s: float
    warm_start_s: float
    waiting: int = -1
    """Requests that may wait; -1 is no bound."""
    tail_s: float = 900.0
    """How long to go on after the last request."""

    def __post_init__(self) -> None:
        for wrong, why in (
            (self.slots < 1, f"a replica takes {self.slots} requests at once; it is 1 or more"),
            (not 0 <= self.start_s < math.inf, f"a start takes {self.start_s} s"),
            (not 0 <= self.warm_start_s < math.inf, f"a warm start takes {self.warm_start_s} s"),
            (self.waiting < -1, f"{self.waiting} requests may wait; -1 is no bound"),
            (not 0 <= self.tail_s < math.inf, f"a tail of {self.tail_s} s"),
        ):
            if wrong:
                raise UsageError(f"bad deployment to simulate: {why}")


@dataclass(frozen=True, slots=True)
class Point:
    """The deployment at one time."""

    at_s: float
    ordered: int
    ready: int
    queued: int
    running: int


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a trace under one policy."""

    name: str
    latencies_s: "array[float]"
    """Of the accepted requests, sorted."""
    rejected: int
    unanswered: int
    """Still waiting an hour after the last request."""
    replica_seconds: float
    largest: int
    changes: int
    points: tuple[Point, ...]


class _World:
    def __init__(self, trace: Trace, service: Service, scaler: Scaler) -> None:
        self._service, self._reports = service, Reports(scaler.reporting)
        self._coming = iter(trace)
        self._shift_s = _LEAD_S - trace[0].at_s
        self._next = next(self._coming, None)
        self.ready = self.ordered = self._held = scaler.least
        self._starting: list[tuple[float, float]] = []
        """(ready at, takes) of each start, the soonest first."""
        self._starts: deque[tuple[Warmth, float]] = deque(maxlen=8)
        self._waiting: deque[tuple[float, Request]] = deque()
        self._ends: list[tuple[float, float]] = []
        self._tokens = 0.0
        self.latencies_s = array("d")
        self.rejected = 0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._ends)

    def observed(self, now_s: float) -> Observed:
        """Return what a policy is told."""
        self._reports.note(now_s, self.queued, self.running, self.ready)
        seen = self._reports.seen(now_s)
        start_s = expected_start_s(self._starts)
        return Observed(
            now_s, seen.running, seen.queued, self.ready, self.ordered, start_s, self._tokens
        )

    def advance(self, until_s: float) -> None:
        """Let everything happen up to a time, in its order; what ends makes room first."""
        while True:
            came_s = math.inf if self._next is None else self._next.at_s + self._shift_s
            ended_s = self._ends[0][0] if self._ends else math.inf
            ready_s = self._starting[0][0] if self._starting else math.inf
            at_s = min(came_s, ended_s, ready_s)
            if at_s > until_s:
                return
            if at_s == ended_s:
                self._tokens -= heapq.heappop(self._ends)[1]
            elif at_s == ready_s:
                self._started(*heapq.heappop(self._starting))
            else:
                self._arrive(at_s)
            while self._waiting and len(self._ends) < self.ready * self._service.slots:
                self._serve(at_s, *self._waiting.popleft())

    def order(self, now_s: float, replicas: int) -> None:
        """Have so many replicas; those that still start are given back first, the latest first."""
        for number in range(self.ordered + 1, replicas + 1):
            warm = number <= self._held
            takes_s = self._service.warm_start_s if warm else self._service.start_s
            heapq.heappush(self._starting, (now_s + takes_s, takes_s))
        if (surplus := self.ordered - replicas) > 0:
            self.ready -= max(0, surplus - len(self._starting))
            self._starting = sorted(self._starting)[: max(0, len(self._starting) - surplus)]
        self.ordered = replicas

    def _started(self, _: float, takes_s: float) -> None:
        self.ready += 1
        cold = takes_s == self._service.start_s
        self._starts.append(("origin" if cold else "disk", takes_s))
        self._held = max(self._held, self.ready)

    def _arrive(self, now_s: float) -> None:
        request, self._next = self._next, next(self._coming, None)
        assert request is not None
        if len(self._ends) < self.ready * self._service.slots:
            self._serve(now_s, now_s, request)
        elif 0 <= self._service.waiting <= len(self._waiting):
            self.rejected += 1
        else:
            self._waiting.append((now_s, request))
            if self.ready == 0:
                self._reports.send(now_s)

    def _serve(self, now_s: float, came_s: float, request: Request) -> None:
        self.latencies_s.append(now_s - came_s + request.seconds)
        self._tokens += request.tokens
        heapq.heappush(self._ends, (now_s + request.seconds, request.tokens))


def run(trace: Trace, scaler: Scaler, service: Service) -> Run:
    """Return what comes of a trace under a policy; the same for the same arguments, always."""
    world = _World(trace, service, scaler)
    last_s = _LEAD_S + trace[-1].at_s - trace[0].at_s + service.tail_s
    if last_s > _MOST_S:
        raise UsageError(f"a trace of {last_s / 86400:.0f} days; times are in seconds")
    tick_s = _TICK_S if last_s <= _COARSE_S else _COARSE_TICK_S
    every = max(1, math.ceil(last_s / tick_s / _POINTS))
    points: list[Point] = []
    ordered_ticks = changes = tick = 0
    while (now_s := tick * tick_s) <= last_s or (
        (world.queued or world.running) and now_s < last_s + _LONGEST_S
    ):
        world.advance(now_s)
        replicas = scaler.decide(world.observed(now_s))
        changed = replicas != world.ordered
        if changed:
            world.order(now_s, replicas)
        if changed or tick % every == 0:
            points.append(Point(now_s, world.ordered, world.ready, world.queued, world.running))
        changes += changed
        ordered_ticks += world.ordered
        tick += 1
    return Run(
        name=scaler.name,
        latencies_s=array("d", sorted(world.latencies_s)),
        rejected=world.rejected,
        unanswered=world.queued,
        replica_seconds=ordered_ticks * tick_s,
        largest=max(point.ordered for point in points),
        changes=changes,
        points=tuple(points),
    )


def ideal(trace: Trace, target: float) -> list[tuple[float, float]]:
    """Return (time, replicas) for requests that never wait: what Little's law asks for."""
    shift_s = _LEAD_S - trace[0].at_s
    steps = sorted(
        step
        for one in trace
        for step in ((one.at_s + shift_s, 1), (one.at_s + shift_s + one.seconds, -1))
    )
    inside = accumulate(change for _, change in steps)
    return [(at_s, count / target) for (at_s, _), count in zip(steps, inside, strict=True)]
