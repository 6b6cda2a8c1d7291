"""What compactors tell each other and those who ask, in the cluster's registry.

lease      at most one drains nodes; it expires, so that one that died is in nobody's way
state      what the plug-in in the controller last thought; also the proof that it is there
hurry      somebody wants it now, without the waits
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from ray.experimental import internal_kv

from weightstream.errors import ClusterError
from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction.planner import Verdict

LEASE_S = 30.0
FRESH_S = 20.0
"""A state that is older was written by a controller that is gone, or has no plug-in any more."""

_NAMESPACE = "weightstream"
_LEASE = "compaction/lease/"
_STATE = "compaction/state"
_HURRY = "compaction/hurry"


@dataclass(frozen=True, slots=True)
class State:
    """What the plug-in thinks."""

    phase: str
    """`waiting`, `warming`, `moving`, `releasing` or `blocked`, and why is in `text`; or `settled`:
    it has looked, and no node can be emptied."""
    text: str
    node_id: str = ""
    """The node that is being emptied."""
    verdicts: tuple[tuple[str, str, str], ...] = ()
    """(node, outcome, reason) of the last look."""
    failures: int = 0
    failure: str = ""
    """How the last attempt failed; empty after a success."""
    emptied: int = 0
    """Nodes since the controller started."""
    missing: Mapping[str, int] = field(default_factory=dict)
    """How many replicas more than now each workload had lately: there stays room for them."""
    at: float = field(default_factory=time.time)
    """Unix time at which it was thought."""
    heard: float = field(default_factory=time.time)
    """Unix time at which it was last said; it holds until then at least."""


def rows_of(verdicts: Iterable[Verdict]) -> tuple[tuple[str, str, str], ...]:
    """Return verdicts as a state has them."""
    return tuple((one.node_id, one.outcome, one.reason) for one in verdicts)


def write_state(state: State) -> None:
    """Let others see what the plug-in thinks."""
    registry.note(_STATE, asdict(state))


def read_state() -> State | None:
    """Return what the plug-in thinks; None when there is none, or it has been silent for long."""
    values: Any = registry.recall(_STATE)
    try:
        values["verdicts"] = tuple(tuple(row) for row in values["verdicts"])
        state = State(**values)
    except (KeyError, TypeError):
        return None
    return state if time.time() - state.heard < FRESH_S else None


def hurry(seconds: float) -> None:
    """Have the plug-in skip its waits for a while."""
    registry.note(_HURRY, time.time() + seconds)


def is_hurried() -> bool:
    """Say whether somebody wants it now."""
    until = registry.recall(_HURRY)
    return isinstance(until, int | float) and time.time() < until


@dataclass(slots=True)
class Lease:
    """The right to drain nodes. Generations, each written once, make taking it over atomic."""

    holder: str
    generation: int = 0

    def take(self) -> None:
        """Take it; raises `ClusterError` that names who has it."""
        generation, held = _latest()
        if held is not None and held[1] > time.time():
            left_s = held[1] - time.time()
            raise ClusterError(
                f"{held[0]} compacts this cluster already; its lease ends in {left_s:.0f} s"
            )
        self.generation = generation + 1
        if internal_kv._internal_kv_put(
            self._key(self.generation), self._value(LEASE_S), False, namespace=_NAMESPACE
        ):
            raise ClusterError("another compactor began at the same moment")
        if generation:
            internal_kv._internal_kv_del(self._key(generation), namespace=_NAMESPACE)

    def renew(self) -> None:
        """Keep it for longer; raises `ClusterError` when somebody has taken it meanwhile."""
        generation, held = _latest()
        if generation != self.generation or held is None:
            who = held[0] if held else "somebody"
            raise ClusterError(f"the lease was not renewed in time: {who} compacts this cluster")
        internal_kv._internal_kv_put(
            self._key(generation), self._value(LEASE_S), True, namespace=_NAMESPACE
        )

    def give_back(self) -> None:
        """End it; the key stays, expired, so that the next generation follows."""
        internal_kv._internal_kv_put(
            self._key(self.generation), self._value(0.0), True, namespace=_NAMESPACE
        )

    def _value(self, seconds: float) -> bytes:
        return json.dumps([self.holder, time.time() + seconds]).encode()

    @staticmethod
    def _key(generation: int) -> str:
        return f"{_LEASE}{generation:012d}"


@contextmanager
def leased(holder: str) -> Iterator[Lease]:
    """Hold the lease for a block."""
    lease = Lease(holder)
    lease.take()
    try:
        yield lease
    finally:
        with suppress(ClusterError):
            lease.renew()  # only what is still ours is given back
            lease.give_back()


def lease_holder() -> str:
    """Return who drains nodes now; empty when nobody does."""
    _, held = _latest()
    return held[0] if held is not None and held[1] > time.time() else ""


def _latest() -> tuple[int, tuple[str, float] | None]:
    keys = sorted(internal_kv._internal_kv_list(_LEASE, namespace=_NAMESPACE))
    if not keys:
        return 0, None
    generation = int(keys[-1].decode().removeprefix(_LEASE))
    raw = internal_kv._internal_kv_get(keys[-1], namespace=_NAMESPACE)
    try:
        holder, until = json.loads(raw or b"")
        return generation, (str(holder), float(until))
    except (TypeError, ValueError):
        return generation, None
