"""What the cluster knows of weights: who loads what, how long it took, and where agents answer.

Kept in Ray's own key-value store, so it lives as long as the cluster and needs no actor, which
would keep a node from being idle. Every function needs a process that is connected to Ray. What was
written by another version, or damaged, counts as absent: whoever reads this does so to be faster.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeVar

from ray.experimental import internal_kv

_NAMESPACE = "weightstream"
_STARTS_KEPT = 8

Warmth = Literal["origin", "peer", "disk", "memory"]
"""Where a start found its weights: page cache (`memory`), the node's store, a peer, the origin."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Deployment:
    """A Serve deployment by its two names."""

    app: str
    name: str


@dataclass(frozen=True, slots=True)
class Weights:
    """A model that the replicas of a deployment load."""

    uri: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a replica, from the replica's process to its readiness."""

    node_id: str
    warmth: Warmth
    seconds: float
    at: float
    """Unix time at which it was ready."""


@dataclass(frozen=True, slots=True)
class Agent:
    """A node's agent: its control socket on that node, and its API for everybody else."""

    node_id: str
    socket: str
    api: str
    """`host:port`; empty where it has none."""
    token: str = field(repr=False)
    pid: int
    """0 where `up` found it, and did not start it."""


def note_weights(deployment: Deployment, weights: Iterable[Weights]) -> None:
    """Say what a deployment's replicas load; the last word holds."""
    _put(_name("weights", deployment), [asdict(one) for one in weights])


def weights_of(deployment: Deployment) -> tuple[Weights, ...]:
    """Return what a deployment's replicas load; nothing when none has said so."""
    return tuple(_read(Weights, _get(_name("weights", deployment))))


def note_start(deployment: Deployment, start: Start) -> None:
    """Add a start to the last few of a deployment."""
    starts = [*starts_of(deployment), start][-_STARTS_KEPT:]
    _put(_name("starts", deployment), [asdict(one) for one in starts])


def starts_of(deployment: Deployment) -> tuple[Start, ...]:
    """Return the last few starts of a deployment's replicas, the latest last."""
    return tuple(_read(Start, _get(_name("starts", deployment))))


def note_agent(agent: Agent) -> None:
    """Say where a node's agent is."""
    _put(f"agents/{agent.node_id}", [asdict(agent)])


def forget_agent(node_id: str) -> None:
    """Take a node's agent off the list."""
    internal_kv._internal_kv_del(f"agents/{node_id}", namespace=_NAMESPACE)


def agents() -> dict[str, Agent]:
    """Return the agents by their node's id; some may be gone without a word."""
    keys = internal_kv._internal_kv_list("agents/", namespace=_NAMESPACE)
    found = (agent for key in keys for agent in _read(Agent, _get(key.decode())))
    return {agent.node_id: agent for agent in found}


def note(key: str, value: object) -> None:
    """Keep any JSON value under a key of one's own; `recall` returns it."""
    _put(f"notes/{key}", value)


def recall(key: str) -> object:
    """Return what `note` kept, or None."""
    return _get(f"notes/{key}")


def noted(prefix: str) -> dict[str, object]:
    """Return what `note` kept under keys that begin so, by key."""
    keys = internal_kv._internal_kv_list(f"notes/{prefix}", namespace=_NAMESPACE)
    found = {key.decode(): _get(key.decode()) for key in keys}
    return {key.removeprefix("notes/"): value for key, value in found.items()}


def drop(key: str) -> None:
    """Forget what `note` kept."""
    internal_kv._internal_kv_del(f"notes/{key}", namespace=_NAMESPACE)


def _name(kind: str, deployment: Deployment) -> str:
    return f"{kind}/{deployment.app}/{deployment.name}"


def _put(key: str, value: object) -> None:
    internal_kv._internal_kv_put(key, json.dumps(value), namespace=_NAMESPACE)


def _get(key: str) -> object:
    raw = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
    try:
        return None if raw is None else json.loads(raw)
    except ValueError:
        return None


def _read(kind: type[_T], value: object) -> Iterator[_T]:
    for fields in value if isinstance(value, list) else ():
        try:
            yield kind(**fields)
        except TypeError:  # another version's
            continue
