"""What Serve's controller sees of the requests, and how late.

A handle reads its gauges every `record_s`, sends the readings of the last `look_back_s` every
`push_s`, and at once for a request that finds no replica; but that one is in the report only once
the gauges have been read with it. The controller reduces the last report anew at each decision: to
the largest reading, or to the mean over time with the last reading holding until now. Both begin
with the newest replica's first reading, and never before there was a request. (Ray 2.60:
router.py, autoscaling_state.py, autoscaling_metrics_merge.py. One handle, without its double count
of a new replica's first requests.)
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True, slots=True)
class Reporting:
    """How a deployment's handles report."""

    push_s: float = 10.0
    look_back_s: float = 30.0
    reduce: Literal["ray", "mean", "max"] = "ray"

    @property
    def record_s(self) -> float:
        """Return how often gauges are read."""
        return min(0.2 * self.look_back_s, self.push_s)


@dataclass(frozen=True, slots=True)
class Reading:
    """The gauges at one time."""

    at_s: float
    queued: float
    running: float
    ready: int = 0
    """Replicas that serve."""


class Reports:
    """One handle's readings, and the last report of them."""

    def __init__(self, how: Reporting) -> None:
        self._how = how
        self._readings: deque[Reading] = deque()
        self._sent: tuple[Reading, ...] = ()
        self._record_at_s = self._push_at_s = 0.0

    def note(self, now_s: float, queued: int, running: int, ready: int) -> None:
        """Read the gauges, and send, where it is time."""
        if now_s >= self._record_at_s:
            self._record_at_s = now_s + self._how.record_s
            self._readings.append(Reading(now_s, queued, running, ready))
        if now_s >= self._push_at_s:
            self._push_at_s = now_s + self._how.push_s
            self.send(now_s)

    def send(self, now_s: float) -> None:
        """Report what has been read."""
        while self._readings and self._readings[0].at_s < now_s - self._how.look_back_s:
            self._readings.popleft()
        self._sent = tuple(self._readings)

    def seen(self, now_s: float) -> Reading:
        """Return queued and running requests as the controller takes them to be."""
        sent: Sequence[Reading] = self._sent
        if self._how.reduce != "mean":
            sent = _aligned(sent, only_changes=self._how.reduce == "max")
        if not sent:
            return Reading(now_s, 0, 0)
        if self._how.reduce == "max":
            most = max(one.queued + one.running for one in sent)
            queued = max(one.queued for one in sent)
            return Reading(now_s, queued, max(0.0, most - queued))
        return _mean(sent, max(now_s, sent[-1].at_s + 1e-3))


def _aligned(sent: Sequence[Reading], only_changes: bool) -> Sequence[Reading]:
    """Return the readings that Ray reduces, which merges a series for each replica.

    The merged series has a point where something changed. Its mean also counts what lasts from
    before the newest replica's first reading; its largest value does not.
    """
    started, changed = 0, []
    for number, (before, after) in enumerate(pairwise((Reading(0, 0, 0), *sent))):
        if number and after.ready > before.ready:
            started = number
        if (after.queued, after.running) != (before.queued, before.running):
            changed.append(number)
    if all(one.ready == 0 for one in sent):
        return sent  # a single series is not merged with any
    if only_changes:
        return [sent[number] for number in changed if number >= started or changed[-1] < started]
    if not changed:
        return ()
    return sent[max(started, changed[0]) if started <= changed[-1] else changed[0] :]


def _mean(sent: Sequence[Reading], until_s: float) -> Reading:
    queued = running = 0.0
    ends = [*(one.at_s for one in sent[1:]), until_s]
    for one, end_s in zip(sent, ends, strict=True):
        queued += one.queued * (end_s - one.at_s)
        running += one.running * (end_s - one.at_s)
    whole_s = until_s - sent[0].at_s
    return Reading(until_s, queued / whole_s, running / whole_s)
