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
    """Return a trace: five workers full of replicas; half of those go, then all but one each."""
    rnd = random.Random(seed)
    sizes = {app: rnd.choice(_SIZES) for app in _APPS}
    growth = tuple(_filled(sizes, rnd) for _ in range(WORKERS))
    peak: Counter[str] = Counter()
    for one in growth:
        peak.update(one)
    half = {app: (count + 1) // 2 for app, count in peak.items()}
    least = dict.fromkeys(peak, 1)
    return Trace(sizes, growth, (Step(5, half), Step(15, least)), 15 + tail_s)


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
