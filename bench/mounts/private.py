"""A mount namespace of the benchmark's own: a killed run leaves no mount behind.

What is mounted in it goes away with its last process, and the benchmark's processes end with the
benchmark. Without root there is none, and mounts are taken away one by one.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

_CLONE_NEWNS = 0x00020000


def enter() -> bool:
    """Give this thread, and what it starts, a mount namespace; return whether it has one now."""
    if os.geteuid() != 0:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    return _run("mount", "--make-rprivate", "/")


def file_system_at(directory: Path, mountinfo: str | None = None) -> str:
    """Return the type of what is mounted exactly there, or nothing; asks no file system.

    A stat would wait for a mount whose server is stuck.
    """
    text = mountinfo or Path("/proc/thread-self/mountinfo").read_text()
    found = ""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[4].replace("\\040", " ") == str(directory):
            found = right.split()[0]
    return found


def take_away(directory: Path) -> None:
    """Unmount, however its server does: detached at once, ended when nobody uses it."""
    while file_system_at(directory):
        unmounted = _run("umount", "-l", str(directory)) if os.geteuid() == 0 else False
        if not unmounted and not _run(_fusermount(), "-u", "-z", str(directory)):
            return


def _fusermount() -> str:
    return shutil.which("fusermount3") or "fusermount"


def _run(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
