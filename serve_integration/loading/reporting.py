"""Says what a load took: one log line, Ray's metrics, and the registry for whoever decides.

Off the load's path, on a thread of its own, and it never fails a load: a cluster that cannot be
asked costs a warning, once. The start of a replica is noted when its constructor has returned, so
that it holds what the constructor does besides loading.
"""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightstream.serve_integration.loading.phases import Instants, Phases
from weightstream.serve_integration.loading.replica import (
    Replica,
    is_constructed,
    replica_began_at,
    this_replica,
)

if TYPE_CHECKING:
    import torch

    from weightstream.serve_integration.registry import Warmth

log = logging.getLogger(__name__)

_LOADS_KEPT = 8
_LOOK_S = 0.02
_LONGEST_START_S = 3600.0
_COLDEST: "tuple[Warmth, ...]" = ("origin", "peer", "disk", "memory")


class _Past:
    """What this process has loaded. `lock` guards everything; held while the registry is asked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loads: deque[Phases] = deque(maxlen=_LOADS_KEPT)
        self.held: dict[int, tuple[str, int]] = {}
        self.start_noted = False
        self.warned = False


_past = _Past()


def is_starting() -> bool:
    """Say whether a load that begins now is part of this replica's start."""
    return not is_constructed()


def has_started() -> bool:
    """Say whether the start of this replica was noted, or there is none."""
    return _past.start_noted or this_replica() is None


def report(module: "torch.nn.Module", ends: Instants) -> None:
    """Report a load that made this module ready; inside of a replica on another thread."""
    try:
        replica = this_replica()
        if replica is None:
            _log(ends.since(ends.called_at), None)
            return
        key = id(module)
        _past.held[key] = ends.report.uri, ends.report.bytes_total
        weakref.finalize(module, _forget, key).atexit = False
        threading.Thread(
            target=_report, args=(replica, ends), name="weightstream-report", daemon=True
        ).start()
    except Exception as error:  # Ray's internals may change; the module is ready all the same
        _warn(error)


def _report(replica: Replica, ends: Instants) -> None:
    try:
        phases = ends.since(replica_began_at() if ends.is_start else ends.called_at)
        _log(phases, replica)
        from weightstream.serve_integration.loading import noting

        with _past.lock:
            _past.loads.append(phases)
            noting.note_loads(replica, tuple(_past.loads), set(_past.held.values()))
        noting.observe(replica, phases)
        if phases.is_start:
            _note_start(replica)
    except Exception as error:  # the cluster's trouble is not the replica's
        _warn(error)


def _note_start(replica: Replica) -> None:
    """Note one start per replica, however many models it loaded for it."""
    from weightstream.serve_integration.loading import noting

    constructed_at = _await_constructor()
    with _past.lock:
        if _past.start_noted or constructed_at is None:
            return
        _past.start_noted = True
        starts = [phases for phases in _past.loads if phases.is_start]
    ready_at = max(constructed_at, *(phases.began_at + phases.ready_s for phases in starts))
    began_at = min(phases.began_at for phases in starts)
    noting.note_start(replica, _coldest(starts), ready_at - began_at, ready_at)


def _await_constructor() -> float | None:
    """Return when the constructor had returned; 0 when it had before anybody looked."""
    if is_constructed():
        return 0.0
    deadline_s = time.monotonic() + _LONGEST_START_S
    while time.monotonic() < deadline_s:
        if is_constructed():
            return time.time()
        time.sleep(_LOOK_S)
    return None


def _coldest(starts: Sequence[Phases]) -> "Warmth":
    found = {phases.warmth for phases in starts}
    return next(warmth for warmth in _COLDEST if warmth in found)


def _forget(key: int) -> None:
    """A module is gone. What the registry says stays until the next load."""
    _past.held.pop(key, None)


def _log(phases: Phases, replica: Replica | None) -> None:
    whose = f" for {replica.app}#{replica.deployment} {replica.id}" if replica else ""
    ends = ", ".join(f"{name} {end:.3f}" for name, end in phases.ends().items())
    log.info(
        "%s is ready%s: %d bytes from %s (%s); seconds: %s",
        phases.uri,
        whose,
        phases.bytes_total,
        phases.warmth,
        dict(phases.bytes_by_source),
        ends,
    )


def _warn(error: Exception) -> None:
    level = logging.DEBUG if _past.warned else logging.WARNING
    _past.warned = True
    log.log(level, "a load is not reported to Ray: %s: %s", type(error).__name__, error)
