"""Every mount of this user, and how it is."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from weightstream.cachefs.fuse.mount_table import mounted_at, mounts
from weightstream.cachefs.fuse.mounts import Record, RunDirectory
from weightstream.cachefs.fuse.supervisor.adoption import Orphan
from weightstream.errors import MountError

_ASK_S = 2.0

# What a mount's own supervisor says of it
READY, RESTARTING, STARTING, STOPPING = "ready", "restarting", "starting", "stopping"
# What can be seen from outside when it says nothing
UNSUPERVISED, SILENT, DEAD, FOREIGN = "unsupervised", "silent", "dead", "foreign"


@dataclass(frozen=True, slots=True)
class MountRow:
    """One mount.

    state: `ready`, `restarting`, `starting`, `stopping`; `unsupervised` when its supervisor was
    killed (it works, and ends with its server); `silent` when a process of it does not answer;
    `dead` when nobody serves it; `foreign` when it is not noted in this run directory: another
    user's, or another container's.
    """

    directory: str
    uri: str
    driver: str
    state: str
    supervisor_pid: int = 0
    server_pid: int = 0
    uptime_s: float = 0.0
    restarts: int = 0
    version: str = ""
    log: str = ""
    gauges: Mapping[str, int] = field(default_factory=dict)
    """What is under way in the server: parked reads, fills, bytes of memory."""


def overview(run: RunDirectory) -> list[MountRow]:
    """Return every mount, sorted by directory; forget those that are gone."""
    rows = {}
    for record in run.records():
        row = _row(run, record)
        if row is not None:
            rows[row.directory] = row
    for found in mounts():
        if found.is_ours and found.directory not in rows:
            # Not looked at: who asks a mount whose server hangs may wait for ever.
            rows[found.directory] = MountRow(found.directory, found.source, "", FOREIGN)
    return [rows[directory] for directory in sorted(rows)]


def _row(run: RunDirectory, record: Record) -> MountRow | None:
    if not run.is_supervised(record.directory):
        return _unsupervised(run, record)
    try:
        answer = run.ask(record.directory, {"command": "status"}, _ASK_S)
    except (ConnectionError, TimeoutError, MountError):
        return _noted(record, SILENT)
    fields = MountRow.__dataclass_fields__
    return MountRow(**{name: value for name, value in answer.items() if name in fields})


def _unsupervised(run: RunDirectory, record: Record) -> MountRow | None:
    found = mounted_at(record.directory)
    if found is None or not found.is_ours:
        run.forget(record.directory)
        return None
    return _noted(record, UNSUPERVISED if Orphan.of(record) is not None else DEAD)


def _noted(record: Record, state: str) -> MountRow:
    dead = state == DEAD
    return MountRow(
        directory=record.directory,
        uri=record.uri,
        driver=record.driver,
        state=state,
        supervisor_pid=record.supervisor_pid if state == SILENT else 0,
        server_pid=0 if dead else record.server_pid,
        uptime_s=0.0 if dead else max(0.0, time.time() - record.mounted_at_s),
        restarts=record.restarts,
        version=record.version,
        log=record.log,
    )
