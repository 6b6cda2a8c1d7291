"""Who uses a mount: processes with a file of it open or mapped, or their directory in it."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from weightstream.cachefs.fuse.mount_table import is_under

_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True)
class User:
    """One process and one thing that it has there."""

    pid: int
    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}) uses {self.path}"


def users_of(directory: str, most: int = 3) -> list[User]:
    """Return who uses a mount, as far as /proc shows it to this user, within two seconds."""
    found: list[User] = []
    deadline_s = time.monotonic() + _LIMIT_S
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if len(found) >= most or time.monotonic() > deadline_s:
            break
        path = next((path for path in _paths(pid) if is_under(path, directory)), None)
        if path is not None:
            found.append(User(pid, _name(pid), path))
    return found


def _paths(pid: int) -> Iterator[str]:
    """Yield what a process has open; names only, nothing is touched."""
    home = f"/proc/{pid}"
    yield from map(_target, (f"{home}/cwd", f"{home}/root", f"{home}/exe"))
    try:
        numbers = os.listdir(f"{home}/fd")
        maps = Path(f"{home}/maps").read_text(errors="surrogateescape")
    except OSError:  # it has ended, or is somebody else's
        return
    yield from (_target(f"{home}/fd/{number}") for number in numbers)
    yield from (line[line.find("/") :] for line in maps.splitlines() if "/" in line)


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process that has ended"
