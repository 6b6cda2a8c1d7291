"""What the cluster is told of a load: the registry's notes and Ray's metrics. Needs Ray.

    weightstream_load_phase_seconds{phase}    when each phase of a load ended, since it began
    weightstream_loads_total{warmth}          loads, by where most of their bytes came from
    weightstream_load_bytes_total{source}     bytes of loads, by source
    weightstream_failed_reloads_total         reloads that failed while another version answers

All have Serve's own labels too: application, deployment, replica.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from weightstream.serve_integration import registry
from weightstream.serve_integration.loading.phases import Phases
from weightstream.serve_integration.loading.replica import Replica

_BOUNDARIES_S = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
_REPLICAS_KEPT = 32
"""Per deployment; what older ones took is in the metrics."""
_TAGS = ("application", "deployment", "replica")


@dataclass(frozen=True, slots=True)
class ReplicaLoads:
    """The last few loads of a replica, which may be gone."""

    app: str
    deployment: str
    replica: str
    node_id: str
    loads: tuple[Phases, ...]


def note_held(replica: Replica, held: Iterable[tuple[str, int]]) -> None:
    """Note the URIs and sizes of what a replica holds, as what its deployment loads."""
    deployment = registry.Deployment(replica.app, replica.deployment)
    registry.note_weights(deployment, [registry.Weights(*weights) for weights in sorted(held)])


def note_loads(replica: Replica, loads: Sequence[Phases]) -> None:
    """Note what a replica has loaded in the registry."""
    document = {"node_id": replica.node_id, "loads": [phases.to_json() for phases in loads]}
    registry.note(_key(replica.app, replica.deployment, replica.id), document)
    _forget_old(replica)


def note_start(replica: Replica, warmth: registry.Warmth, seconds: float, ready_at: float) -> None:
    """Note how long a replica's start took."""
    deployment = registry.Deployment(replica.app, replica.deployment)
    registry.note_start(deployment, registry.Start(replica.node_id, warmth, seconds, ready_at))


def noted_loads(app: str | None = None) -> list[ReplicaLoads]:
    """Return what replicas, of one application or of all, have noted; the oldest first."""
    found = registry.noted(f"phases/{app}/" if app is not None else "phases/")
    loads = [one for key, value in found.items() if (one := _read(key, value)) is not None]
    return sorted(loads, key=lambda one: one.loads[0].began_at)


def observe(replica: Replica, phases: Phases) -> None:
    """Add a load to Ray's metrics."""
    tags, metrics = _tags(replica), _metrics()
    for phase, end_s in phases.ends().items():
        metrics.seconds.observe(end_s, tags | {"phase": phase})
    metrics.loads.inc(1, tags | {"warmth": phases.warmth})
    for source, count in phases.bytes_by_source.items():
        if count:
            metrics.load_bytes.inc(count, tags | {"source": source})


def count_failed_reload(replica: Replica) -> None:
    """Add a failed reload to Ray's metrics."""
    _metrics().failed_reloads.inc(1, _tags(replica))


def _tags(replica: Replica) -> dict[str, str]:
    return dict(zip(_TAGS, (replica.app, replica.deployment, replica.id), strict=True))


@dataclass(frozen=True, slots=True)
class _Metrics:
    """Ray's own kinds."""

    seconds: Any
    loads: Any
    load_bytes: Any
    failed_reloads: Any


@cache
def _metrics() -> _Metrics:
    from ray.util.metrics import Counter, Histogram

    return _Metrics(
        seconds=Histogram(
            "weightstream_load_phase_seconds",
            "When each phase of a load ended, since it began.",
            boundaries=_BOUNDARIES_S,
            tag_keys=(*_TAGS, "phase"),
        ),
        loads=Counter(
            "weightstream_loads",
            "Loads, by where most of their bytes came from.",
            tag_keys=(*_TAGS, "warmth"),
        ),
        load_bytes=Counter(
            "weightstream_load_bytes", "Bytes of loads, by source.", tag_keys=(*_TAGS, "source")
        ),
        failed_reloads=Counter(
            "weightstream_failed_reloads",
            "Reloads that failed while another version answers.",
            tag_keys=_TAGS,
        ),
    )


def _key(app: str, deployment: str, replica: str) -> str:
    return f"phases/{app}/{deployment}/{replica}"


def _forget_old(replica: Replica) -> None:
    found = registry.noted(_key(replica.app, replica.deployment, ""))
    if len(found) <= _REPLICAS_KEPT:
        return
    loads = {key: _read(key, value) for key, value in found.items()}
    ages = sorted(loads, key=lambda key: one.loads[-1].began_at if (one := loads[key]) else 0.0)
    for key in ages[:-_REPLICAS_KEPT]:
        registry.drop(key)


def _read(key: str, value: object) -> ReplicaLoads | None:
    if not isinstance(value, dict):
        return None
    loads = tuple(
        phases for one in value.get("loads", ()) if (phases := Phases.from_json(one)) is not None
    )
    _, app, deployment, replica = key.split("/", 3)
    return (
        ReplicaLoads(app, deployment, replica, str(value.get("node_id")), loads) if loads else None
    )
