"""From the command line to a supervisor: in the background, or in this process's place."""

import json
import os
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightstream.cachefs.fuse.mounts import name_of
from weightstream.cachefs.fuse.supervisor.children import environment
from weightstream.cachefs.fuse.supervisor.handover import Job, command
from weightstream.errors import MountError

# A supervisor ends by itself within five seconds, and its limits end a mount that does not come up.
_END_S = 8.0
_MARGIN_S = 15.0

# What may be relative to the directory in which the command was given; a daemon leaves that.
_PATHS = (
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "PYTHONPATH",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_FILE",
    "WEIGHTSTREAM_CONFIG",
)


def log_path(directory: str) -> Path:
    """Return where the log of a mount in the background goes."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        base = "/var/log" if os.geteuid() == 0 else os.path.expanduser("~/.local/state")
    return Path(base) / "weightstream" / f"{name_of(directory)}.log"


def prepare_log(directory: str) -> Path:
    """Return the path of a mount's log; make its folder, and see that it can be written."""
    path = log_path(directory)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise MountError(f"cannot write the log {path}: {error.strerror}") from error
    return path


def run_in_place(job: Job) -> None:
    """Become the supervisor: same process, terminal and environment. Returns only by an error."""
    line, descriptor = command(job)
    os.set_inheritable(descriptor, True)
    os.execv(line[0], line)


def start(job: Job) -> dict[str, Any]:
    """Start a supervisor in the background; return its report once the mount works.

    Raises `MountError` with the cause and its exit code when it does not; then nothing is left.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        pidfd = _spawn(replace(job, report=write), write)
    except OSError as error:
        os.close(read)
        raise MountError(f"cannot start the mount's process: {error}") from error
    finally:
        os.close(write)
    limits = job.limits
    deadline_s = time.monotonic() + limits.prepare_s + limits.ready_s + _MARGIN_S
    try:
        return _outcome(_line(read, deadline_s), job)
    except BaseException:
        _end(pidfd)
        raise
    finally:
        os.close(read)
        os.close(pidfd)


def _spawn(job: Job, pipe: int) -> int:
    line, descriptor = command(job)
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        for kept in (descriptor, pipe):
            os.set_inheritable(kept, True)
        pid = os.posix_spawn(
            line[0],
            line,
            _environment(),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGCHLD],
        )
    finally:
        os.close(log)
        os.close(descriptor)
    return os.pidfd_open(pid)


def _environment() -> Mapping[str, str]:
    given = dict(environment())
    for name in _PATHS:
        if given.get(name):
            parts = given[name].split(os.pathsep)
            given[name] = os.pathsep.join(os.path.abspath(part) if part else "" for part in parts)
    return given


def _line(pipe: int, deadline_s: float) -> bytes:
    """Return what the supervisor says, "" when it says nothing until its end or the deadline."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    data = b""
    while not data.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
            break
        part = os.read(pipe, 1 << 16)
        if not part:
            break
        data += part
    return data


def _outcome(line: bytes, job: Job) -> dict[str, Any]:
    if not line:
        raise MountError(f"the process of {job.spec.directory} ended early; see {job.log}")
    report: dict[str, Any] = json.loads(line)
    if report.pop("event") == "failed":
        raise MountError(str(report["error"]), int(report["exit_code"]))
    return report


def _end(pidfd: int) -> None:
    """Leave no supervisor: it unmounts and ends its server on SIGTERM."""
    for number, wait_s in ((signal.SIGTERM, _END_S), (signal.SIGKILL, 1.0)):
        if is_gone(pidfd, 0.0):
            break
        signal.pidfd_send_signal(pidfd, number)
        if is_gone(pidfd, wait_s):
            break


def is_gone(pidfd: int, wait_s: float) -> bool:
    """Return whether a process has ended within some time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))
