"""A server whose supervisor was killed: how another supervisor takes over from it.

It goes on serving, with the one descriptor of /dev/fuse that is left. pidfd_getfd(2) gives us a
duplicate; with that the server may be killed and replaced like any other.
"""

import ctypes
import os
import select
import signal
from contextlib import suppress
from dataclasses import dataclass

from weightstream.cachefs.fuse.mounts import Record, started
from weightstream.cachefs.fuse.supervisor.attachment import DEVICE, KernelAttachment
from weightstream.cachefs.fuse.supervisor.handover import Job
from weightstream.errors import MountError

_SYS_PIDFD_GETFD = 438  # the same number on every architecture
_KILL_S = 2.0


class Orphan:
    """The server of a dead supervisor."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    @classmethod
    def of(cls, record: Record) -> "Orphan | None":
        """Return the server that a record names, if it still lives."""
        if not record.server_pid or started(record.server_pid) != record.server_started:
            return None
        try:
            return cls(record.server_pid)
        except ProcessLookupError:
            return None

    def device(self) -> int:
        """Return a duplicate of its descriptor of /dev/fuse. Raises `MountError`."""
        try:
            folder = f"/proc/{self.pid}/fd"
            numbers = [int(n) for n in os.listdir(folder) if _leads(f"{folder}/{n}")]
        except OSError as error:
            raise MountError(f"cannot take over from process {self.pid}: {error}") from error
        if not numbers:
            raise MountError(f"process {self.pid} does not hold {DEVICE}")
        libc = ctypes.CDLL(None, use_errno=True)
        found: int = libc.syscall(_SYS_PIDFD_GETFD, self._pidfd, numbers[0], 0)
        if found < 0:
            cause = os.strerror(ctypes.get_errno())
            raise MountError(f"cannot take {DEVICE} over from process {self.pid}: {cause}")
        return found  # close-on-exec, as pidfd_getfd makes it

    def is_gone(self, wait_s: float = 0.0) -> bool:
        """Return whether it has ended, or does within some time."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(wait_s * 1000))

    def kill(self) -> None:
        """End it, and wait until it is gone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.is_gone(_KILL_S)
        os.close(self._pidfd)


@dataclass(frozen=True, slots=True)
class Inheritance:
    """A mount that outlived its supervisor."""

    record: Record
    attachment: KernelAttachment
    orphan: Orphan | None


def inherit(job: Job, record: Record | None, kept: int) -> Inheritance | None:
    """Return the mount at the job's directory if it can be gone on with, else None.

    `kept` is the descriptor that systemd kept, or -1; without one its server is asked for it.
    Raises `MountError` when there is a mount and a server, but the descriptor cannot be had.
    """
    found = None
    device = kept
    if record is not None and record.init and job.spec.driver == "kernel":
        orphan = Orphan.of(record)
        if device < 0 and orphan is not None:
            device = orphan.device()
        candidate = KernelAttachment(job.spec, job.source, device)
        if candidate.is_alive() and candidate.is_visible():
            found = Inheritance(record, candidate, orphan)
    if found is None and device >= 0:
        os.close(device)
    return found


def _leads(link: str) -> bool:
    try:
        return os.readlink(link) == DEVICE
    except FileNotFoundError:
        return False
