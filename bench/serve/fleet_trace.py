"""A fleet that grew with its load, and a load that drops: pure, and the same for the same seed."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

WORKERS = 5
CPUS = 4.0
"""Of each worker, as Ray counts them."""
_APPS = "abcdefgh"
_SIZES = (0.5, 1.0, 1.5, 2.0)
_LEFT = 0.45
"""Of the CPUs, at most."""

Targets = Mapping[str, int]
"""App -> replicas."""


@dataclass(frozen=True, slots=True)
class Step:
    """From when on how many replicas are wanted."""

    at_s: float
    targets: Targets


@dataclass(frozen=True, slots=True)
class Trace:
    """What every run goes through."""

    sizes: Mapping[str, float]
    """App -> CPUs of a replica."""
    growth: tuple[Targets, ...]
    """The replicas that fill each worker, as one after the other joins."""
    steps: tuple[Step, ...]
    end_s: float

    @property
    def best(self) -> int:
        """Return the workers that best fit decreasing needs at the end."""
        last = self.steps[-1].targets
        return bins([self.sizes[app] for app, count in last.items() for _ in range(count)], CPUS)


def trace(seed: int, tail_s: float) -> Trace:
    """Return a trace: five workers full of replicas of apps, then some apps lose all their load.

    As many as it takes until less than half of the CPUs are in use: half of their replicas go, then
    the others. What is left lies where it lay.
    """
    rnd = random.Random(seed)
    sizes = {app: rnd.choice(_SIZES) for app in _APPS}
    growth = tuple(_filled(sizes, rnd) for _ in range(WORKERS))
    peak: Counter[str] = Counter()
    for one in growth:
        peak.update(one)
    gone = _gone(sizes, peak, rnd)
    half = {app: count // 2 if app in gone else count for app, count in peak.items()}
    least = {app: 0 if app in gone else count for app, count in peak.items()}
    return Trace(sizes, growth, (Step(5, half), Step(15, least)), 15 + tail_s)


def _gone(sizes: Mapping[str, float], peak: Targets, rnd: random.Random) -> set[str]:
    """Return the apps whose load goes, in a random order."""
    used, gone = sum(sizes[app] * count for app, count in peak.items()), set[str]()
    for app in rnd.sample(sorted(peak), len(peak)):
        if used < _LEFT * WORKERS * CPUS:
            break
        gone.add(app)
        used -= sizes[app] * peak[app]
    return gone


def _filled(sizes: Mapping[str, float], rnd: random.Random) -> Counter[str]:
    """Return replicas of random apps that fill a worker to the last half CPU, if they can."""
    chosen: Counter[str] = Counter()
    room = CPUS
    while fitting := [app for app in sizes if sizes[app] <= room]:
        app = rnd.choice(fitting)
        chosen[app] += 1
        room -= sizes[app]
    return chosen


def bins(sizes: Iterable[float], capacity: float) -> int:
    """Return how many bins best fit decreasing takes."""
    rooms: list[float] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - size)
    return len(rooms)


def node_seconds(gone_at_s: Sequence[float], end_s: float) -> float:
    """Return what all workers together cost; each until it was gone, the others until the end."""
    return sum(gone_at_s) + (WORKERS - len(gone_at_s)) * end_s
