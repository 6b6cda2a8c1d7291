"""Says what a load took: one log line, Ray's metrics, and the registry for whoever decides.

Off the load's path, on a thread of its own, and it never fails a load: a cluster that cannot be
asked, or a Ray whose internals have changed, costs a warning, once. The start of a replica is noted
when its constructor has returned, so that it holds what the constructor does besides loading.

In a replica lines go to Serve's own logger, and so to the replica's log: it shows INFO, and the
root logger of a Ray worker does not.
"""

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from weightstream.log import get_logger
from weightstream.serve_integration.loading.phases import Instants, Phases
from weightstream.serve_integration.loading.replica import (
    Replica,
    answers_a_request,
    is_constructed,
    replica_began_at,
    this_replica,
)

if TYPE_CHECKING:
    import torch

    from weightstream.serve_integration.registry import Warmth

log = get_logger(__name__)
serve_log = get_logger("ray.serve.weightstream")

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
    try:
        return not is_constructed()
    except Exception as error:  # Ray's internals may change; loading works without
        _warn(error)
        return False


def belongs_to_start() -> bool:
    """Say whether a load that begins now, perhaps in the first `reconfigure`, is part of a start.

    Serve calls that after the constructor and before the first request.
    """
    if is_starting():
        return True
    try:
        return this_replica() is not None and not (_past.start_noted or answers_a_request())
    except Exception as error:
        _warn(error)
        return False


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
        _start(lambda: _report(replica, ends))
    except Exception as error:
        _warn(error)
        _log(ends.since(ends.called_at), None)


def let_go(module: "torch.nn.Module") -> None:
    """Report that another took this module's place: nobody needs to hold its weights ready.

    It may live on until its last request ends. One that merely dies is not reported: a replica that
    ends lets go of all its modules, and its successors will want them.
    """
    if _past.held.pop(id(module), None) is not None:  # only in a replica anything is held
        _start(_report_held)


def report_failed_reload(uri: str, kept: str, error: Exception) -> None:
    """Log and count that a version was not loaded while another one answers."""
    _start(lambda: _report_failed_reload(uri, kept, error))


def _start(work: Callable[[], None]) -> None:
    def run() -> None:
        try:
            work()
        except Exception as error:  # the cluster's trouble is not the replica's
            _warn(error)

    threading.Thread(target=run, name="weightstream-report", daemon=True).start()


def _report_held() -> None:
    from weightstream.serve_integration.loading import noting

    if (replica := this_replica()) is not None:
        with _past.lock:
            noting.note_held(replica, set(_past.held.values()))


def _report_failed_reload(uri: str, kept: str, cause: Exception) -> None:
    replica = this_replica()
    where = log if replica is None else serve_log
    where.error("%s is not loaded, %s goes on answering: %s", uri, kept, cause)
    if replica is not None:
        from weightstream.serve_integration.loading import noting

        noting.count_failed_reload(replica)


def _report(replica: Replica, ends: Instants) -> None:
    began_at = replica_began_at() if ends.is_start else ends.called_at
    phases = ends.since(began_at, ends.upstream())
    _log(phases, replica)
    from weightstream.serve_integration.loading import noting

    with _past.lock:
        _past.loads.append(phases)
        noting.note_held(replica, set(_past.held.values()))
        noting.note_loads(replica, tuple(_past.loads))
    noting.observe(replica, phases)
    if phases.is_start:
        _note_start(replica)


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
    (serve_log if replica else log).info(
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
    log.log(
        level,
        "loads work, but are not reported to Ray as they should be; this is for Ray 2.60: %s: %s",
        type(error).__name__,
        error,
    )
