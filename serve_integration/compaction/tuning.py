"""What can be set about compaction while it runs.

Kept in the registry, so that `weightstream serve compact --tune KEY=VALUE` reaches the plug-in in
Serve's controller without a restart.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from weightstream.errors import UsageError
from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction.guard import Pace
from weightstream.serve_integration.compaction.planner import Limits

_KEY = "compaction/tuning"


@dataclass(frozen=True, slots=True)
class Tuning:
    """Waits in seconds, and limits of a plan."""

    stable_s: float = -1.0
    """Every deployment healthy and at its target for that long; -1: as long as Ray's
    RAY_SERVE_NODE_COMPACTION_DELAY_S says."""
    cooldown_s: float = 30.0
    backoff_s: float = 30.0
    backoff_max_s: float = 3600.0
    look_back_s: float = 600.0
    """There stays room for as many replicas as each deployment had within that time."""
    warm_s: float = 300.0
    """Most that is waited for the destinations to hold the weights."""
    move_s: float = 900.0
    """Most that moving a node's replicas may take; then it is cancelled."""
    release_s: float = 120.0
    """How long new replicas are kept off an emptied node while nobody takes it away."""
    keep_nodes: int = 1
    max_moves: int = 64
    max_load_bytes: int = 1 << 40
    prices: Mapping[str, float] = field(default_factory=lambda: {"GPU": 20.0, "CPU": 1.0})

    def pace(self, ray_stable_s: float) -> Pace:
        """Return the waits; Ray's own time of stability where none was set."""
        stable_s = self.stable_s if self.stable_s >= 0 else ray_stable_s
        return Pace(stable_s, self.cooldown_s, self.backoff_s, self.backoff_max_s)

    def limits(self, placed_by_ray: bool = False) -> Limits:
        """Return what a plan may not do."""
        return Limits(self.keep_nodes, self.max_moves, self.max_load_bytes, placed_by_ray)


def parse(values: object) -> Tuning:
    """Return tuning from JSON values; raises `UsageError` that names what is wrong."""
    if not isinstance(values, dict):
        raise UsageError(f"compaction is tuned by an object, not by {values!r}")
    known = {one.name for one in fields(Tuning)}
    if unknown := sorted(values.keys() - known):
        raise UsageError(f"nothing is called {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return replace(Tuning(), **{name: _checked(name, value) for name, value in values.items()})


def with_pairs(tuning: Tuning, pairs: Iterable[str]) -> Tuning:
    """Return tuning with some of it set by `KEY=VALUE`."""
    values = asdict(tuning)
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            raise UsageError(f"--tune {pair!r} is not of the form KEY=VALUE")
        try:
            values[name.strip().replace("-", "_")] = json.loads(text)
        except ValueError as error:
            raise UsageError(f"--tune {pair!r}: {text!r} is neither number nor object") from error
    return parse(values)


def read() -> Tuning:
    """Return what was set last, or the defaults."""
    values = registry.recall(_KEY)
    return Tuning() if values is None else parse(values)


def write(tuning: Tuning) -> None:
    """Set it, for both engines, at once."""
    registry.note(_KEY, asdict(tuning))


def _checked(name: str, value: Any) -> Any:
    if name == "prices":
        if isinstance(value, dict) and all(_is_amount(one) for one in value.values()):
            return dict(value)
        raise UsageError(f'prices={value!r}: it is an object of numbers, such as {{"GPU": 20}}')
    default = getattr(Tuning(), name)
    whole = isinstance(default, int)
    least = -1 if name == "stable_s" else 0
    if not _is_amount(value, least) or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise UsageError(f"{name}={value!r}: it is a {kind}, {least} or more")
    return type(default)(value)


def _is_amount(value: Any, least: float = 0) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= least
