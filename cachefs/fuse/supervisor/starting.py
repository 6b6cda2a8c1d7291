"""What happens before a mount has a supervisor: the driver is chosen, the directory looked at."""

import importlib.util
import os
import select
import shutil
import sys

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.mount_table import Mounted, cannot_unmount, mounted_at
from weightstream.cachefs.fuse.mounts import Driver, RunDirectory
from weightstream.cachefs.fuse.supervisor.adoption import Orphan
from weightstream.cachefs.fuse.supervisor.attachment import DEVICE, fusermount
from weightstream.cachefs.fuse.supervisor.children import Child
from weightstream.errors import MountError, UsageError

# statvfs(2) is never answered from the kernel's memory. One that works is answered within
# milliseconds; a dead one refuses at once. The rest is starting a Python.
_PROBE_S = 5.0
_PROBE = "import os, sys; os.statvfs(sys.argv[1])"


def choose_driver(wanted: str) -> Driver:
    """Return the driver to use; raise `UsageError` that says what is missing."""
    kernel, fuse_python = why_not_kernel(), why_not_fuse_python()
    if wanted == "kernel" or (wanted == "auto" and not kernel):
        if kernel:
            raise UsageError(f"the kernel driver does not work here: {kernel}")
        return "kernel"
    if fuse_python:
        other = f"; the kernel driver: {kernel}" if wanted == "auto" else ""
        raise UsageError(f"the fuse-python driver does not work here: {fuse_python}{other}")
    return "fuse-python"


def why_not_kernel() -> str:
    """Return what the kernel driver lacks here; nothing when it would work."""
    if not os.path.exists(DEVICE):
        return f"{DEVICE} is missing (modprobe fuse; in a container: --device {DEVICE})"
    if not mount_table.privileged():
        return "it needs root (CAP_SYS_ADMIN)"
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"cannot open {DEVICE}: {error.strerror}"
    return ""


def why_not_fuse_python() -> str:
    """Return what the fuse-python driver lacks here; nothing when it would work."""
    if not os.path.exists(DEVICE):
        return f"{DEVICE} is missing (modprobe fuse; in a container: --device {DEVICE})"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} is not for this user (as root: chmod 666 {DEVICE})"
    # `fuse` alone may be fusepy, another package with the same module.
    if not importlib.util.find_spec("fuse") or not importlib.util.find_spec("fuseparts"):
        return "it needs fuse-python (pip install 'weightstream[fuse]')"
    if not shutil.which("fusermount"):
        return "it needs fusermount (apt-get install fuse)"
    return ""


def free_directory(run: RunDirectory, directory: str, source: str) -> str:
    """Return the directory to mount at, as the kernel writes it; clean away a dead mount there.

    A mount of the same origin whose supervisor was killed is left for the new one to take over.
    Raises `UsageError` when it cannot be mounted at, `MountError` when it is.
    """
    path = mount_table.canonical(directory)
    found = mounted_at(path)
    if run.is_supervised(path):
        record = run.record(path)
        what = f"with {record.uri}" if record is not None else "just now"
        raise MountError(f"{path} is mounted already {what} (weightstream umount {path})")
    if found is None or not found.is_ours or _kept_by_systemd():
        return path
    record = run.record(path)
    if record is not None and Orphan.of(record) is not None:
        if record.uri != source:
            hint = f"its supervisor is gone; weightstream umount {path}"
            raise MountError(f"{path} is mounted already with {record.uri} ({hint})")
        return path
    _refuse_if_served(found)
    detach(path, lazy=True, force=False)
    return path


def _kept_by_systemd() -> bool:
    return os.environ.get("LISTEN_PID") == str(os.getpid())


def _refuse_if_served(found: Mounted) -> None:
    health = probe(found.directory)
    if health == "dead":
        return
    says = "is mounted already by another user" if health == "served" else "does not answer"
    hint = f"weightstream umount --force {found.directory}"
    raise MountError(f"{found.directory} {says} ({found.source}; {hint})")


def probe(directory: str) -> str:
    """Return whether a mount that nobody here knows is `served`, `dead` or `silent`.

    In a process of its own: one that asks a server that does not answer may not be killable.
    """
    child = Child.spawn([sys.executable, "-I", "-c", _PROBE, directory], quiet=True)
    poll = select.poll()
    poll.register(child.pidfd, select.POLLIN)
    if not poll.poll(_PROBE_S * 1000):
        child.kill()
        return "silent"
    child.ended()
    child.close()
    return "served" if child.exit_code == 0 else "dead"


def detach(directory: str, lazy: bool, force: bool) -> None:
    """Unmount a directory without asking anybody. Raises `MountError` that says why not."""
    flags = mount_table.MNT_DETACH if lazy or force else 0
    flags |= mount_table.MNT_FORCE if force else 0
    try:
        if mount_table.privileged():
            mount_table.unmount(directory, flags)
        else:
            fusermount(directory, lazy or force)
    except OSError as error:
        raise cannot_unmount(directory, error) from error
