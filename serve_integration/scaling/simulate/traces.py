"""Traffic as a list of requests: read from a file, written to one, or made up."""

import csv
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from random import Random
from typing import Any

from weightstream.errors import UsageError

_TOKENS_PER_S = 50.0
_SPREAD = 0.4
"""Sigma of a made-up request's log-normal duration: the longest in a hundred takes 2.5 times."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it comes and how long a replica works on it."""

    at_s: float
    seconds: float
    tokens: float = 0.0


Trace = tuple[Request, ...]


def load(source: str, seed: int = 0) -> Trace:
    """Return the trace of a file, or of a generator such as `burst` or `poisson:rate=5,over=60`.

    Raises:
        UsageError: no such file or generator, or a line that is no request.
    """
    kind, _, settings = source.partition(":")
    if kind in GENERATORS:
        return _sorted(_generated(kind, settings, Random(seed)))
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"no trace {source!r}: a CSV or JSONL file, or {', '.join(GENERATORS)}")
    return _sorted(_read(path))


def write(trace: Trace, path: Path) -> None:
    """Write a trace as CSV, or as JSON lines where the name ends in .jsonl."""
    rows = [{"time": one.at_s, "duration": one.seconds, "tokens": one.tokens} for one in trace]
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(file, ["time", "duration", "tokens"])
            table.writeheader()
            table.writerows(rows)


def _read(path: Path) -> Iterator[Request]:
    with path.open(encoding="utf-8", newline="", errors="replace") as file:
        lines = _Lines(file)
        try:
            if path.suffix == ".jsonl":
                yield from map(_request, map(json.loads, filter(str.strip, lines)))
            else:
                yield from map(_request, csv.DictReader(lines))
        except json.JSONDecodeError as error:
            raise UsageError(f"{path}:{lines.number}: no JSON: {error.msg}") from None
        except (ValueError, csv.Error) as error:
            raise UsageError(f"{path}:{lines.number}: {error}") from None


class _Lines:
    """A file's lines, and the number of the last one that was read."""

    def __init__(self, file: Iterable[str]) -> None:
        self._file = file
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.number += 1
            yield line


def _request(row: Any) -> Request:
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    one = Request(_number(row, "time"), _number(row, "duration"), _number(row, "tokens", 0.0))
    if one.seconds < 0 or one.tokens < 0:
        raise ValueError(f"{one.seconds:g} s and {one.tokens:g} tokens; both are 0 or more")
    return one


def _number(row: dict[str, Any], name: str, default: float | None = None) -> float:
    value = row.get(name)
    if value in (None, ""):
        if default is None:
            raise ValueError(f"no {name}")
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}; it is a number")
    return number


def _sorted(requests: Iterable[Request]) -> Trace:
    trace = tuple(sorted(requests, key=attrgetter("at_s")))
    if not trace:
        raise UsageError("the trace has no requests")
    return trace


def _burst(
    random: Random, count: float = 40, seconds: float = 1, times: float = 1, every: float = 300
) -> Iterator[Request]:
    """`count` requests within a tenth of a second, `times` times."""
    for start in range(int(times)):
        for _ in range(int(count)):
            yield _made(random, start * every + random.random() / 10, seconds)


def _poisson(
    random: Random, rate: float = 10, over: float = 600, seconds: float = 1
) -> Iterator[Request]:
    """`rate` requests a second, independent of each other."""
    return _thinned(random, lambda _: rate, rate, over, seconds)


def _ramp(
    random: Random, to: float = 50, over: float = 600, seconds: float = 1, start: float = 1
) -> Iterator[Request]:
    """From `start` to `to` requests a second."""
    return _thinned(
        random, lambda at_s: start + (to - start) * at_s / over, max(to, start), over, seconds
    )


def _daily(
    random: Random, peak: float = 50, trough: float = 2, over: float = 3600, seconds: float = 1
) -> Iterator[Request]:
    """A day pressed into `over` seconds: from the trough to the peak and back."""

    def rate(at_s: float) -> float:
        return trough + (peak - trough) * (1 - math.cos(2 * math.pi * at_s / over)) / 2

    return _thinned(random, rate, peak, over, seconds)


GENERATORS: dict[str, Callable[..., Iterator[Request]]] = {
    "burst": _burst,
    "ramp": _ramp,
    "daily": _daily,
    "poisson": _poisson,
}


def _thinned(
    random: Random, rate: Callable[[float], float], most: float, over_s: float, seconds: float
) -> Iterator[Request]:
    """Arrivals at a rate that changes: those of the highest rate, kept with its share of it."""
    at_s = random.expovariate(most)
    while at_s < over_s:
        if random.random() * most < rate(at_s):
            yield _made(random, at_s, seconds)
        at_s += random.expovariate(most)


def _made(random: Random, at_s: float, seconds: float) -> Request:
    took_s = random.lognormvariate(math.log(seconds) - _SPREAD**2 / 2, _SPREAD)
    return Request(round(at_s, 4), round(took_s, 4), round(took_s * _TOKENS_PER_S))


def _generated(kind: str, settings: str, random: Random) -> Iterator[Request]:
    known = list(inspect.signature(GENERATORS[kind]).parameters)[1:]
    given: dict[str, float] = {}
    for pair in filter(None, settings.split(",")):
        name, _, value = pair.partition("=")
        try:
            given[name] = float(value)
        except ValueError:
            given[name] = math.nan
        if name not in known or not 0 < given[name] < math.inf:
            raise UsageError(f"bad {pair!r} for {kind}: {', '.join(known)}, each =NUMBER above 0")
    return GENERATORS[kind](random, **given)
