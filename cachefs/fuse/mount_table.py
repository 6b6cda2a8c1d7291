"""The kernel's table of mounts, and the system calls that change it.

Nothing here touches what is mounted: a `stat` of a mount whose server hangs would hang as well, and
in a state that not even SIGKILL ends. So directories are looked up in the table, by name.
"""

import ctypes
import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from weightstream.errors import MountBusyError, MountError, UsageError

FILE_SYSTEM = "fuse.weightstream"

MNT_FORCE, MNT_DETACH, UMOUNT_NOFOLLOW = 1, 2, 8
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_ESCAPE = re.compile(r"\\([0-7]{3})")
_CONNECTIONS = "/sys/fs/fuse/connections"


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of the table."""

    device: str  # "0:45"
    directory: str
    kind: str
    source: str

    @property
    def minor(self) -> int:
        """Return the minor device number, which names a FUSE connection."""
        return int(self.device.partition(":")[2])

    @property
    def is_ours(self) -> bool:
        """Return whether weightstream mounted it."""
        return self.kind == FILE_SYSTEM


def mounts() -> list[Mounted]:
    """Return every mount of this namespace; what lies on top of another comes after it."""
    text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    return [_parse(line) for line in text.splitlines()]


def mounted_at(directory: str) -> Mounted | None:
    """Return what is mounted at a directory, the uppermost."""
    at = [one for one in mounts() if one.directory == directory]
    return at[-1] if at else None


def mount_of(path: str) -> Mounted | None:
    """Return our mount that holds a path.

    By name first; only a path that is in none of ours by name is followed through its symlinks.
    """
    ours = [one for one in mounts() if one.is_ours]
    return _holding(ours, os.path.abspath(path)) or _holding(ours, os.path.realpath(path))


def _holding(candidates: list[Mounted], path: str) -> Mounted | None:
    holding = [one for one in candidates if is_under(path, one.directory)]
    return max(holding, key=lambda one: len(one.directory), default=None)


def is_under(path: str, directory: str) -> bool:
    """Return whether a path is a directory or lies in it, by name."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def canonical(directory: str) -> str:
    """Return a directory's path as the kernel writes it, without looking at a mount of ours there.

    Raises `UsageError` when there is no such directory.
    """
    path = os.path.abspath(directory)
    parent, name = os.path.split(path)
    for candidate in (path, os.path.join(os.path.realpath(parent), name)):
        found = mounted_at(candidate)
        if found is not None and found.is_ours:
            return candidate
    try:
        is_directory = stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        raise UsageError(f"cannot mount at {path}: {error.strerror}") from error
    if not is_directory:
        raise UsageError(f"cannot mount at {path}: it is not a directory")
    return os.path.realpath(path)


def mount(device: int, directory: str, source: str, allow_other: bool) -> None:
    """Mount the file system that is served through a descriptor of /dev/fuse, read-only.

    Raises `OSError`.
    """
    options = [
        f"fd={device}",
        f"rootmode={stat.S_IFDIR | 0o555:o}",
        f"user_id={os.geteuid()}",
        f"group_id={os.getegid()}",
        "default_permissions",
    ]
    if allow_other:
        options.append("allow_other")
    _call(
        "mount",
        os.fsencode(source),
        os.fsencode(directory),
        FILE_SYSTEM.encode(),
        ctypes.c_ulong(_MS_RDONLY | _MS_NOSUID | _MS_NODEV),
        ",".join(options).encode(),
    )


def unmount(directory: str, flags: int = 0) -> None:
    """Call umount2(2). Raises `OSError`: EBUSY, EINVAL when nothing is mounted there."""
    _call("umount2", os.fsencode(directory), ctypes.c_int(flags | UMOUNT_NOFOLLOW))


def cannot_unmount(directory: str, error: OSError) -> MountError:
    """Return the error for what the system said."""
    if error.errno == errno.EBUSY:
        return MountBusyError(f"cannot unmount {directory}: it is in use")
    return MountError(f"cannot unmount {directory}: {error.strerror or error}")


def abort(minor: int) -> None:
    """Have the kernel end a connection: whoever waits for it gets an error at once.

    Needed only when a server cannot be killed (it waits for a disk that hangs), and so still holds
    the descriptor whose closing does the same. Raises `OSError`.
    """
    if not os.path.exists(f"{_CONNECTIONS}/{minor}/abort"):
        # Without systemd the control file system is not there.
        _call("mount", b"fusectl", _CONNECTIONS.encode(), b"fusectl", ctypes.c_ulong(0), None)
    Path(f"{_CONNECTIONS}/{minor}/abort").write_text("1")


def privileged() -> bool:
    """Return whether this process may mount: CAP_SYS_ADMIN, also in a user namespace."""
    status = Path("/proc/self/status").read_text()
    effective = int(re.findall(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)[0], 16)
    return bool(effective >> 21 & 1)


def _call(name: str, *arguments: object) -> None:
    # Per call: the supervisor calls this twice in its life, and the C library is loaded anyway.
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _parse(line: str) -> Mounted:
    """Read `36 35 0:45 / /mnt rw,noatime master:1 - fuse.weightstream s3://models rw`."""
    before, _, after = line.partition(" - ")
    device, _, directory = before.split(" ")[2:5]
    kind, source = after.split(" ")[:2]
    return Mounted(device, _unescape(directory), kind, _unescape(source))


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
