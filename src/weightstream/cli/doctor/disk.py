"""The store's disk: file system, space, direct I/O, locks. Probes write one page and remove it."""

import errno
import fcntl
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from weightstream.cli.doctor.check import Check
from weightstream.settings import PAGE, Settings, format_bytes

GROUP = "store"
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "glusterfs", "afs"})
_MEMORY = frozenset({"tmpfs", "ramfs"})


def checks(settings: Settings) -> list[Check]:
    """Return the rows about the store's directory and its disk."""
    directory = _directory(settings.store)
    rows = [directory, _file_system(settings.store), _space(settings)]
    if directory.status != "ok":
        return rows
    with tempfile.TemporaryDirectory(dir=existing(settings.store), prefix=".doctor-") as folder:
        probe = Path(folder) / "probe"
        rows.append(_direct_io(probe, settings))
        rows.append(_locks(probe))
    return rows


def existing(path: Path) -> Path:
    """Return the nearest ancestor that exists: where the store would be created."""
    return next((here for here in (path, *path.parents) if here.exists()), Path("/"))


def _directory(path: Path) -> Check:
    here = existing(path)
    if not here.is_dir():
        found = f"{here} is not a directory"
    elif os.access(here, os.R_OK | os.W_OK | os.X_OK):
        return Check(GROUP, "directory", "ok", f"{path}{'' if here == path else ' (new)'}")
    else:
        found = f"no permission to write {here}"
    limits = "nothing is kept: every process fetches from the origin"
    return Check(GROUP, "directory", "fail", found, limits, "set WEIGHTSTREAM_STORE")


def _file_system(path: Path) -> Check:
    kind = file_system(existing(path).resolve(), Path("/proc/self/mountinfo").read_text())
    if kind in _MEMORY:
        limits = "the store competes with the models for memory and is lost at reboot"
    elif kind in _NETWORK:
        limits = "warm loads run at the network's speed, and locks may not hold between nodes"
    elif kind == "overlay":
        limits = "the store is lost with the container"
    else:
        return Check(GROUP, "file system", "ok", kind)
    remedy = "set WEIGHTSTREAM_STORE to a directory on a local disk (in a container: a volume)"
    return Check(GROUP, "file system", "warn", kind, limits, remedy)


def file_system(path: Path, mountinfo: str) -> str:
    """Return the type of the file system that `path` lies on (see proc(5) for the fields)."""
    best, kind = -1, "unknown"
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        mounted = Path(left.split()[4].replace("\\040", " "))
        if path.is_relative_to(mounted) and len(mounted.parts) >= best:
            best, kind = len(mounted.parts), right.split()[0]
    return kind


def _space(settings: Settings) -> Check:
    usage = shutil.disk_usage(existing(settings.store))
    spare = usage.free - settings.store_min_free_bytes
    found = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    if spare >= 1 << 30:
        return Check(GROUP, "space", "ok", found)
    limits = f"below what is kept free ({format_bytes(settings.store_min_free_bytes)}): no caching"
    return Check(GROUP, "space", "warn", found, limits, "weightstream evict, or a larger disk")


def _direct_io(probe: Path, settings: Settings) -> Check:
    if settings.direct_io == "off":
        return Check(GROUP, "direct I/O", "ok", "turned off by direct_io=off")
    error = _attempt(lambda: _write_direct(probe))
    if error is None:
        return Check(GROUP, "direct I/O", "ok", "O_DIRECT works")
    found = f"O_DIRECT is refused ({error})"
    limits = "write-back goes through the page cache: several times the CPU, and memory pressure"
    return Check(GROUP, "direct I/O", "warn", found, limits, "use ext4 or xfs for the store")


def _write_direct(probe: Path) -> None:
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
    try:
        with mmap.mmap(-1, PAGE) as page:
            os.pwrite(descriptor, page, 0)
    finally:
        os.close(descriptor)


def _locks(probe: Path) -> Check:
    error = _attempt(lambda: _lock(probe))
    if error is None:
        return Check(GROUP, "locks", "ok", "open-file-description locks work")
    found = f"open-file-description locks are refused ({error})"
    limits = "processes cannot share the store"
    return Check(GROUP, "locks", "fail", found, limits, "use a local disk for the store")


def _lock(probe: Path) -> None:
    with probe.open("w+b") as file:
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, request)


def _attempt(probe: Callable[[], None]) -> str | None:
    try:
        probe()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return None
