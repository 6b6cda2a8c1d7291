"""How many replicas a deployment should have, as a function without a clock.

The load is the number of requests inside: queued and running. By Little's law that is what arrives
per second times how long one takes, so neither has to be known, and unlike a utilisation it does
not stop at 100 %. From it follows the size at once, `ceil(concurrency / target)`, up or from zero,
in one decision. Growing asks for confirmation, shorter where requests wait and none from zero.
Shrinking is patient: the largest size of the last `scale_down_after_s` holds.

A replica ordered now helps after `start_s`. Where concurrency has been rising all through the
window, what it will have risen to by then is ordered now. Three medians of the window's thirds must
rise for it: neither a spike nor a step is a trend.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import dropwhile
from statistics import median_low

from weightstream.errors import UsageError

_SAMPLES = 30
"""Samples in the window of the trend: ten for each third's median."""
_COVERED = 0.9
"""The part of the window that samples must reach back over before there is a trend."""
_EPSILON = 1e-9
"""4.000000000001 / 2 needs two replicas, not three: what is measured is a float."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the owner of a deployment wishes."""

    target: float
    """Requests that one replica is to have at once."""
    min: int
    max: int
    step: int = 1
    """Sizes are rounded up to multiples of this, up to `max`."""
    headroom: int = 0
    """Steps that are kept on top while there is traffic."""
    scale_down_after_s: float = 60.0
    """The largest size of this long holds."""
    idle_after_s: float = 300.0
    """Without any request for this long, the last step goes (if `min` is 0)."""
    confirm_s: float = 1.0
    """A larger size must be wanted for this long where requests wait and a replica is ready."""
    calm_s: float = 10.0
    """And for this long where less than `target` of them wait: replicas take what is above it."""
    growth: float | None = None
    """At most so many times as many replicas as are ready, if set; one step is always allowed."""
    trend_s: float = 30.0
    """The window in which a rise is looked for; 0 never orders ahead."""
    target_tokens: float | None = None
    """Tokens that one replica is to have at once; None where requests are alike."""

    def __post_init__(self) -> None:
        for wrong, why in self._rules():
            if wrong:
                raise UsageError(f"bad scaling policy: {why}")

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        return (
            (not _positive(self.target), f"target is {self.target}; it is a number above 0"),
            (self.min < 0, f"min is {self.min}; it is 0 or more"),
            (self.max < 1, f"max is {self.max}; it is 1 or more"),
            (self.min > self.max, f"min {self.min} is above max {self.max}"),
            (self.step < 1, f"step is {self.step}; it is 1 or more"),
            (self.step > self.max, f"step {self.step} is above max {self.max}"),
            (self.headroom < 0, f"headroom is {self.headroom} steps; it is 0 or more"),
            (
                self.headroom * self.step >= self.max,
                f"headroom of {self.headroom} x {self.step} replicas leaves none of max {self.max}",
            ),
            *(
                (not 0 <= value < math.inf, f"{name} is {value}; it is 0 seconds or more")
                for name, value in (
                    ("scale_down_after_s", self.scale_down_after_s),
                    ("idle_after_s", self.idle_after_s),
                    ("confirm_s", self.confirm_s),
                    ("calm_s", self.calm_s),
                    ("trend_s", self.trend_s),
                )
            ),
            (
                self.growth is not None and not 1 < self.growth < math.inf,
                f"growth is {self.growth}; it is a factor above 1",
            ),
            (
                self.target_tokens is not None and not _positive(self.target_tokens),
                f"target_tokens is {self.target_tokens}; it is a number above 0",
            ),
        )


@dataclass(frozen=True, slots=True)
class Observed:
    """A deployment as it is now."""

    now_s: float
    """On any clock that does not go back."""
    running: float
    """Requests that replicas have."""
    queued: float
    """Requests that wait for a replica."""
    ready: int
    """Replicas that serve."""
    ordered: int
    """Replicas that were last asked for."""
    start_s: float = 0.0
    """How long one ordered now will take to be ready; 0 where nobody knows."""
    tokens: float | None = None
    """Tokens of the running requests; None where nobody counts them."""

    @property
    def concurrency(self) -> float:
        """Return the requests inside."""
        return self.running + self.queued


@dataclass(frozen=True, slots=True)
class State:
    """What a decision hands to the next."""

    peaks: tuple[tuple[float, int], ...] = ()
    """(time, size) over `scale_down_after_s`, falling: the first is the largest of them."""
    urgent: tuple[tuple[float, int], ...] = ()
    """(time, size) over `confirm_s`, rising: the first is the smallest of them."""
    calm: tuple[tuple[float, int], ...] = ()
    """The same over `calm_s`."""
    samples: tuple[tuple[float, float], ...] = ()
    """(time, concurrency), some of them, over the window of the trend."""
    busy_s: float | None = None
    """When there was traffic last."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there should be, and the numbers that say why."""

    replicas: int
    need: int
    """What the requests inside need by themselves."""
    ahead: int
    """What they will need when a replica ordered now is ready."""
    wanted: int
    """What that comes to with steps, headroom and bounds; `replicas` is more while more is held."""


def decide(seen: Observed, policy: Policy, state: State) -> tuple[Decision, State]:
    """Return how many replicas there should be, and the state for the next decision."""
    first = not state.peaks
    samples = _sampled(seen, policy, state.samples)
    need = _need(seen, seen.concurrency, policy)
    ahead = _need(seen, _expected(seen, policy, samples), policy)
    wanted = _bounded(_capped(_sized(max(need, ahead), policy), seen, policy), policy)
    urgent, calm = _lows(seen, wanted, policy, state)
    size = min(wanted, max(urgent[0][1], calm[0][1], seen.ordered if seen.ready else wanted))
    # Where nothing is remembered (the controller has restarted), what was ordered counts as needed.
    peak = max(size, seen.ordered) if first else size
    peaks = _slid(state.peaks, seen.now_s, peak, policy.scale_down_after_s, operator.gt)
    busy = seen.concurrency > 0 or (first and seen.ordered > 0)
    busy_s = seen.now_s if busy else state.busy_s
    awake = busy_s is not None and seen.now_s - busy_s < policy.idle_after_s
    replicas = _bounded(max(peaks[0][1], policy.step if awake else 0), policy)
    return Decision(replicas, need, ahead, size), State(peaks, urgent, calm, samples, busy_s)


def _need(seen: Observed, concurrency: float, policy: Policy) -> int:
    """Return the replicas for so many requests, by number and by weight."""
    load = concurrency / policy.target
    if policy.target_tokens is not None and seen.tokens is not None and seen.running > 0:
        # Nobody has counted those that wait: they are taken to weigh what the running ones do.
        load = max(load, seen.tokens * (concurrency / seen.running) / policy.target_tokens)
    return math.ceil(load - _EPSILON)


def _expected(seen: Observed, policy: Policy, samples: tuple[tuple[float, float], ...]) -> float:
    """Return the concurrency to be expected when a replica ordered now is ready.

    A queue that builds up while replicas start looks like a rise, so what waits counts as part of
    the rise; and nothing is expected to more than double what runs.
    """
    rise = min(_rise_per_s(samples, seen.now_s, policy.trend_s) * seen.start_s, seen.running)
    return seen.running + max(seen.queued, rise)


def _rise_per_s(samples: tuple[tuple[float, float], ...], now_s: float, window_s: float) -> float:
    """Return how fast concurrency rises in every part of the window; 0 where it does not."""
    if not samples or now_s - samples[0][0] < _COVERED * window_s:
        return 0.0
    third_s = window_s / 3
    parts: tuple[list[float], ...] = ([], [], [])
    for at_s, value in samples:
        parts[max(0, 2 - int((now_s - at_s) / third_s))].append(value)
    if not all(parts):
        return 0.0
    # The lower of two: a step leaves two thirds at the same of its two values, wherever it is.
    early, middle, late = map(median_low, parts)
    return max(0.0, min(middle - early, late - middle) / third_s)


def _sampled(
    seen: Observed, policy: Policy, samples: tuple[tuple[float, float], ...]
) -> tuple[tuple[float, float], ...]:
    if not policy.trend_s:
        return ()
    if samples and seen.now_s - samples[-1][0] < policy.trend_s / _SAMPLES:
        return samples
    recent = dropwhile(lambda sample: seen.now_s - sample[0] > policy.trend_s, samples)
    return (*recent, (seen.now_s, seen.concurrency))


def _sized(need: int, policy: Policy) -> int:
    """Return a need in whole steps, with the headroom if there is any need."""
    steps = -(-need // policy.step)
    return (steps + policy.headroom) * policy.step if steps else 0


def _lows(
    seen: Observed, wanted: int, policy: Policy, state: State
) -> tuple[tuple[tuple[float, int], ...], tuple[tuple[float, int], ...]]:
    """Return the least that was wanted of late: while requests wait, and all through."""
    waits = seen.queued >= policy.target
    pressing = wanted if waits else min(wanted, seen.ordered)
    return (
        _slid(state.urgent, seen.now_s, pressing, policy.confirm_s, operator.lt),
        _slid(state.calm, seen.now_s, wanted, policy.calm_s, operator.lt),
    )


def _slid(
    kept: tuple[tuple[float, int], ...],
    now_s: float,
    size: int,
    window_s: float,
    beats: Callable[[int, int], bool],
) -> tuple[tuple[float, int], ...]:
    """Return what a sliding window's extreme needs: each entry beats all that came after it."""
    recent = dropwhile(lambda entry: now_s - entry[0] > window_s, kept)
    return (*(entry for entry in recent if beats(entry[1], size)), (now_s, size))


def _capped(size: int, seen: Observed, policy: Policy) -> int:
    """Hold growth to a factor of what is ready, where one is set; from zero there is none to hold.

    It counts what is ready and not what is ordered: decisions come ten times a second.
    """
    if policy.growth is None or seen.ready == 0:
        return size
    most = max(math.floor(seen.ready * policy.growth), seen.ready + policy.step, seen.ordered)
    return min(size, most)


def _bounded(size: int, policy: Policy) -> int:
    return min(max(size, policy.min), policy.max)


def _positive(value: float) -> bool:
    return 0 < value < math.inf
