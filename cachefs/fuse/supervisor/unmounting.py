"""Ending a mount from outside: by its supervisor, or without one."""

import os
from contextlib import suppress

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.mount_table import mounted_at
from weightstream.cachefs.fuse.mounts import Record, RunDirectory
from weightstream.cachefs.fuse.supervisor import launching
from weightstream.cachefs.fuse.supervisor.adoption import Orphan
from weightstream.cachefs.fuse.supervisor.starting import detach
from weightstream.cachefs.fuse.supervisor.users import users_of
from weightstream.errors import MountBusyError, MountError

# A supervisor answers at once and ends within five seconds.
_ASK_S = 3.0
_END_S = 10.0


def unmount(run: RunDirectory, directory: str, lazy: bool = False, force: bool = False) -> str:
    """End the mount at a directory and return its path; wait for its processes unless `lazy`.

    Raises `MountError`; when the mount is in use, one that says by whom.
    """
    path = mount_table.canonical(directory)
    record = run.record(path)
    found = mounted_at(path)
    if (found is None or not found.is_ours) and record is None:
        what = f"{path} is {found.kind} of another program" if found else f"nothing is at {path}"
        raise MountError(f"weightstream has no mount there: {what}")
    try:
        if not _by_supervisor(run, path, lazy, force):
            _directly(run, path, record, lazy, force)
    except MountBusyError as error:
        raise MountBusyError(f"{error}{_by_whom(path)}") from error
    return path


def _by_supervisor(run: RunDirectory, path: str, lazy: bool, force: bool) -> bool:
    """Have the supervisor do it; return whether there is one that answers."""
    if not run.is_supervised(path):
        return False
    question = {"command": "umount", "lazy": lazy, "force": force}
    record = run.record(path)
    pidfd = _pidfd(record.supervisor_pid if record is not None else 0)
    try:
        run.ask(path, question, _ASK_S)
        if not lazy and pidfd >= 0 and not launching.is_gone(pidfd, _END_S):
            raise MountError(f"{path} is unmounted, but its supervisor has not ended")
    except (ConnectionError, TimeoutError):
        return False
    finally:
        if pidfd >= 0:
            os.close(pidfd)
    return True


def _directly(run: RunDirectory, path: str, record: Record | None, lazy: bool, force: bool) -> None:
    """Unmount by the system call; the server without a supervisor hears of it from the kernel."""
    found = mounted_at(path)
    if found is not None and found.is_ours:
        detach(path, lazy, force)
    orphan = Orphan.of(record) if record is not None else None
    if orphan is not None and not lazy:
        _end(orphan, force)
    if not run.is_supervised(path):
        run.forget(path)


def _end(orphan: Orphan, force: bool) -> None:
    """Wait for a server to end by itself, then end it."""
    orphan.is_gone(0.5 if force else _ASK_S)
    orphan.kill()


def _by_whom(path: str) -> str:
    users = "; ".join(map(str, users_of(path)))
    hint = "--lazy takes it out of sight now, --force ends its readers"
    return f": {users} ({hint})" if users else f" ({hint})"


def _pidfd(pid: int) -> int:
    with suppress(OSError):
        return os.pidfd_open(pid)
    return -1
