"""Destinations get the weights before anything moves there."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from weightstream.log import get_logger
from weightstream.serve_integration.compaction.fleet import Fleet, Plan, Workload

log = get_logger(__name__)

_T = TypeVar("_T")


class Warm(Protocol):
    """Has nodes (id -> URIs) bring models into their stores, and waits.

    Returns why some are not warm, in one line, or nothing; raises only what is unexpected. It is
    called on a thread of its own, and nobody waits for it longer than `timeout_s`.
    """

    def __call__(self, wanted: Mapping[str, tuple[str, ...]], timeout_s: float) -> str:
        """See the class."""
        ...


class Held(Protocol):
    """Says how many bytes of each model each node holds: node -> URI -> bytes. May block."""

    def __call__(self, uris: tuple[str, ...]) -> Mapping[str, Mapping[str, int]]:
        """See the class."""
        ...


def wanted_by(fleet: Fleet, plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return what the destinations of a plan still have to load: node -> URIs."""
    workloads = {one.id: one.workload for one in fleet.node(plan.node_id).replicas}
    wanted: dict[str, dict[str, None]] = {}
    for replica_id, node_ids in plan.moves.items():
        for node_id in node_ids:
            for uri in _missing(fleet, node_id, workloads[replica_id]):
                wanted.setdefault(node_id, {})[uri] = None
    return {node_id: tuple(uris) for node_id, uris in wanted.items()}


def _missing(fleet: Fleet, node_id: str, workload: Workload) -> list[str]:
    holds = fleet.node(node_id).holds
    return [one.uri for one in workload.models if holds.get(one.uri, 0) < one.size_bytes]


def warm_by_agents(wanted: Mapping[str, tuple[str, ...]], timeout_s: float) -> str:
    """Have the nodes' agents prefetch."""
    from weightstream.serve_integration.nodes import warm

    deadline_s = time.monotonic() + timeout_s
    nodes_of: dict[tuple[str, ...], list[str]] = {}
    for node_id, uris in wanted.items():
        nodes_of.setdefault(uris, []).append(node_id)
    cold: list[str] = []
    begun = [warm(uris, node_ids) for uris, node_ids in nodes_of.items()]
    for warming in begun:
        if not warming.wait(max(0.0, deadline_s - time.monotonic())):
            warming.cancel()
        cold += [
            f"{one.node_id[:8]} is {one.state}" + (f" ({one.reason})" if one.reason else "")
            for one in warming.progress().values()
            if one.state != "warm"
        ]
    return ", ".join(cold)


def held_by_agents(uris: tuple[str, ...]) -> Mapping[str, Mapping[str, int]]:
    """Ask the nodes' agents."""
    from weightstream.serve_integration.nodes.holding import holdings

    if not uris:
        return {}
    return {
        node_id: {uri: one.held_bytes for uri, one in models.items()}
        for node_id, models in holdings(uris).items()
    }


@dataclass(slots=True)
class Errand(Generic[_T]):
    """Work on a thread of its own, for a loop that looks in and must not wait.

    An error counts as an answer, too: `result` raises it. One that takes too long is left to
    itself; what it still returns is for nobody.
    """

    work: Callable[[], _T]
    timeout_s: float
    what: str
    _begun_s: float = field(default_factory=time.monotonic)
    _ended: threading.Event = field(default_factory=threading.Event)
    _result: _T | None = None
    _error: Exception | None = None

    def __post_init__(self) -> None:
        name = f"weightstream-compaction-{self.what.replace(' ', '-')}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self.work()
        except Exception as error:  # for whoever asks for the result
            self._error = error
        finally:
            self._ended.set()

    def is_over(self) -> bool:
        """Say whether it ended, or has had its time."""
        return self._ended.is_set() or time.monotonic() > self._begun_s + self.timeout_s

    def result(self) -> _T:
        """Return what it returned; raises what it raised, and `TimeoutError` after its time."""
        if not self._ended.is_set():
            raise TimeoutError(f"{self.what}: not done within {self.timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]
