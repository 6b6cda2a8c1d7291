"""The policies that a simulation compares, each with how it sees the world.

`Concurrency` is `scaling.policy.decide` itself. `RayDefault` follows Ray 2.60's default policy and
the rules around it, with its defaults; a test runs the two side by side. `Utilisation` is what a
horizontal pod autoscaler does with the share of busy slots.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from weightstream.serve_integration.scaling.policy import Observed, Policy, State, decide
from weightstream.serve_integration.scaling.simulate.reports import Reporting

_OFTEN = Reporting(push_s=0.5, look_back_s=1.0, reduce="max")
_STOCK = Reporting()
_SCRAPED = Reporting(push_s=15.0, look_back_s=30.0, reduce="mean")
_FRESH = State()


class Scaler(Protocol):
    """Decides how many replicas there should be."""

    @property
    def name(self) -> str:
        """Return what it is called in tables and pictures."""
        ...

    @property
    def reporting(self) -> Reporting:
        """Return how it wishes to be told."""
        ...

    @property
    def least(self) -> int:
        """Return how many replicas there are while nothing happens."""
        ...

    def decide(self, seen: Observed) -> int:
        """Return how many replicas there should be now."""
        ...


@dataclass(slots=True)
class Concurrency:
    """Ours."""

    policy: Policy
    name: str = "weightstream"
    reporting: Reporting = _OFTEN
    state: State = _FRESH

    @property
    def least(self) -> int:
        """Return how many replicas there are while nothing happens."""
        return self.policy.min

    def decide(self, seen: Observed) -> int:
        """Return how many replicas there should be now."""
        decision, self.state = decide(seen, self.policy, self.state)
        return decision.replicas


@dataclass(slots=True)
class RayDefault:
    """Ray Serve's own: the ratio of requests to their target, delayed."""

    target: float
    min: int
    max: int
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    name: str = "Ray default"
    reporting: Reporting = _STOCK
    _way: int = 0
    """1 while it wishes for more, -1 for fewer."""
    _since_s: float = 0.0

    @property
    def least(self) -> int:
        """Return how many replicas there are while nothing happens."""
        return self.min

    def decide(self, seen: Observed) -> int:
        """Return how many replicas there should be now."""
        if seen.ready == 0:
            # Whatever the queue: one, unless more were asked for before.
            wanted = max(1, seen.ordered) if seen.concurrency > 0 else seen.ordered
            return self._bounded(wanted)
        # Concurrency over target by way of the ratio and the difference, to round as Ray does.
        desired = seen.ready * (seen.concurrency / (self.target * seen.ready))
        scaled = seen.ready + 1.0 * (desired - seen.ready)
        return self._bounded(self._delayed(math.ceil(scaled), seen))

    def _delayed(self, wanted: int, seen: Observed) -> int:
        way = (wanted > seen.ordered) - (wanted < seen.ordered)
        if way != self._way:
            self._way, self._since_s = way, seen.now_s
        delay_s = self.upscale_delay_s if way > 0 else self.downscale_delay_s
        if not way or seen.now_s - self._since_s + 1e-6 < delay_s:
            return seen.ordered
        self._way = 0
        return wanted if way > 0 or seen.ordered == 1 else max(1, wanted)

    def _bounded(self, wanted: int) -> int:
        return min(max(wanted, self.min), self.max)


@dataclass(slots=True)
class Utilisation:
    """Keeps the share of busy slots where it should be, as Kubernetes does; never at zero."""

    target: float
    """Busy share of a replica's slots, 0 to 1."""
    slots: int
    min: int
    max: int
    every_s: float = 15.0
    tolerance: float = 0.1
    down_after_s: float = 300.0
    name: str = "utilisation"
    reporting: Reporting = _SCRAPED
    _next_s: float = 0.0
    _wanted: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def least(self) -> int:
        """Return how many replicas there are while nothing happens."""
        return max(self.min, 1)

    def decide(self, seen: Observed) -> int:
        """Return how many replicas there should be now."""
        if seen.now_s < self._next_s:
            return max(seen.ordered, self.least)
        self._next_s = seen.now_s + self.every_s
        ratio = seen.running / (max(seen.ready, 1) * self.slots) / self.target
        steady = abs(ratio - 1) <= self.tolerance
        wanted = seen.ordered if steady else math.ceil(max(seen.ready, 1) * ratio)
        if ratio > 1:  # those that start count as idle: they are no reason to have fewer
            wanted = max(wanted, seen.ordered)
        # The stock behaviour: at most double, or four more, in one step.
        wanted = min(wanted, max(2 * seen.ordered, seen.ordered + 4))
        return min(max(self._stable(seen.now_s, wanted), self.least), self.max)

    def _stable(self, now_s: float, wanted: int) -> int:
        self._wanted.append((now_s, wanted))
        while now_s - self._wanted[0][0] > self.down_after_s:
            self._wanted.popleft()
        return max(size for _, size in self._wanted)
