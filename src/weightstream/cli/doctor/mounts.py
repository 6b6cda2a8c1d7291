"""Mounts: which driver would be used and why, and what limits it. What can be tried, is tried."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.kernel.device import request_timeout_s
from weightstream.cachefs.fuse.probing import Probed
from weightstream.cachefs.fuse.supervisor.attachment import DEVICE, FUSERMOUNTS
from weightstream.cachefs.fuse.supervisor.starting import choose_driver, why_not_kernel
from weightstream.cli.doctor.check import Check, Status
from weightstream.cli.doctor.disk import existing
from weightstream.errors import UsageError
from weightstream.settings import Settings, format_bytes

GROUP = "mount"
LIMITS = Path("/proc/sys/fs/fuse")
CONFIGURATION = Path("/etc/fuse.conf")
_PROBE_S = 20.0
_DEFAULT_PAGES = 256
_WISHED_PAGES = 4096
_AS_ROOT = "run it as root; in a container: --cap-add SYS_ADMIN --device /dev/fuse"


def checks(settings: Settings) -> list[Check]:
    """Return the rows about mounting."""
    privileged = mount_table.privileged()
    return [
        device(),
        capability(privileged),
        driver(settings),
        *probed(_probe(settings) if privileged and not why_not_kernel() else None),
        requests(),
        request_timeout(settings, request_timeout_s()),
        fusermount(privileged),
        other_users(privileged),
    ]


def device(path: Path = Path(DEVICE)) -> Check:
    """Report whether a file system can be mounted here at all."""
    limits = "no mounts; loading does not need it"
    if os.access(path, os.R_OK | os.W_OK):
        return Check(GROUP, "fuse", "ok", str(path))
    if path.exists():
        remedy = f"sudo chmod 666 {path}, as udev does"
        return Check(GROUP, "fuse", "warn", f"no permission for {path}", limits, remedy)
    remedy = f"modprobe fuse; in a container: --device {path} --cap-add SYS_ADMIN"
    return Check(GROUP, "fuse", "warn", f"{path} does not exist", limits, remedy)


def capability(privileged: bool) -> Check:
    """Report whether this process may mount by itself."""
    if privileged:
        return Check(GROUP, "capability", "ok", "CAP_SYS_ADMIN")
    limits = "only the fuse-python driver: no passthrough, and what is open dies with the server"
    return Check(GROUP, "capability", "warn", "no CAP_SYS_ADMIN", limits, _AS_ROOT)


def driver(settings: Settings) -> Check:
    """Report which driver a mount would use, and why not the better one."""
    try:
        chosen = choose_driver(settings.driver)
    except UsageError as error:
        remedy = f"pip install 'weightstream[fuse]' and apt-get install fuse3, or {_AS_ROOT}"
        return Check(GROUP, "driver", "warn", f"none: {error}", "no mounts", remedy)
    if chosen == "kernel":
        return Check(GROUP, "driver", "ok", "kernel")
    why = why_not_kernel()
    if not why:  # it was asked for
        limits = "complete files are read through a process: no passthrough"
        remedy = "set WEIGHTSTREAM_DRIVER=auto"
        return Check(GROUP, "driver", "warn", f"{chosen}, by setting", limits, remedy)
    limits = "reads cost several times the CPU of the kernel driver's"
    return Check(GROUP, "driver", "warn", f"{chosen}; the kernel driver: {why}", limits, _AS_ROOT)


def _probe(settings: Settings) -> Probed:
    """Try in a process of its own: it changes its view of the file system."""
    command = [sys.executable, "-m", "weightstream.cachefs.fuse.probing"]
    store = existing(settings.store)
    try:
        done = subprocess.run(
            [*command, str(store)], capture_output=True, text=True, timeout=_PROBE_S
        )
    except subprocess.TimeoutExpired:
        return Probed(f"no answer within {_PROBE_S:g} s", "not tried", "not tried")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Probed(last, "not tried", "not tried")
    return Probed(**json.loads(done.stdout))


def probed(found: Probed | None) -> list[Check]:
    """Report what a mount of the kernel driver can do here."""
    if found is None:
        found = Probed("", *["not tried: it is for the kernel driver"] * 2)
    elif found.mount:
        limits, remedy = (
            "the kernel driver cannot be used",
            f"set WEIGHTSTREAM_DRIVER or {_AS_ROOT}",
        )
        return [Check(GROUP, "trial mount", "warn", found.mount, limits, remedy)]
    return [_passthrough(found.passthrough), _read_ahead(found.read_ahead)]


def _passthrough(refused: str) -> Check:
    if not refused:
        return Check(GROUP, "passthrough", "ok", "tried: files of the store are passed through")
    limits = "complete files are read through the server: a third of the disk cache's speed"
    remedy = f"Linux 6.9 or newer, the store on ext4, xfs or tmpfs; {_AS_ROOT}"
    return Check(GROUP, "passthrough", "warn", refused, limits, remedy)


def _read_ahead(refused: str) -> Check:
    if not refused:
        return Check(GROUP, "readahead", "ok", "tried: it can be set for each mount")
    limits = "cold reads come in requests of 128 KiB: about half the speed"
    remedy = "mount as root with a writable /sys, or as root after each mount: "
    remedy += "echo 16384 > /sys/class/bdi/$(mountpoint -d DIRECTORY)/read_ahead_kb"
    return Check(GROUP, "readahead", "warn", refused, limits, remedy)


def requests(limits: Path = LIMITS) -> Check:
    """Report how large a request may be."""
    pages = _number(limits / "max_pages_limit") or _DEFAULT_PAGES
    size = format_bytes(pages * os.sysconf("SC_PAGE_SIZE"))
    found = f"{size} at most (fs.fuse.max_pages_limit {pages})"
    remedy = f"sudo sysctl fs.fuse.max_pages_limit={_WISHED_PAGES} (Linux 6.13)"
    if pages < _DEFAULT_PAGES:
        return Check(GROUP, "requests", "warn", found, "more requests for cold reads", remedy)
    if pages >= _WISHED_PAGES:
        return Check(GROUP, "requests", "ok", found)
    return Check(GROUP, "requests", "ok", found, "larger ones would cost less CPU", remedy)


def request_timeout(settings: Settings, limit_s: int | None) -> Check:
    """Report whether the kernel ends a mount that leaves a request unanswered for some time."""
    if limit_s is None:
        return Check(GROUP, "request timeout", "ok", "none")
    found = f"the kernel ends a mount that does not answer for {limit_s} s"
    if limit_s >= settings.deadline_s * 1.25:
        return Check(GROUP, "request timeout", "ok", found)
    limits = f"reads fail after {limit_s * 0.8:g} s instead of deadline_s"
    remedy = "sudo sysctl fs.fuse.max_request_timeout=0 fs.fuse.default_request_timeout=0"
    return Check(GROUP, "request timeout", "warn", found, limits, remedy)


def fusermount(privileged: bool) -> Check:
    """Report the program that mounts for ordinary users."""
    program = next(filter(None, map(shutil.which, FUSERMOUNTS)), None)
    bad: Status = "ok" if privileged else "warn"
    limits, remedy = "ordinary users cannot mount", "sudo apt-get install fuse3"
    if program is None:
        return Check(GROUP, "fusermount", bad, "not installed", limits, remedy)
    found = os.stat(program)
    if found.st_uid == 0 and found.st_mode & stat.S_ISUID:
        return Check(GROUP, "fusermount", "ok", program)
    remedy = f"sudo chown root {program} && sudo chmod u+s {program}"
    return Check(GROUP, "fusermount", bad, f"{program} is not set-uid root", limits, remedy)


def other_users(privileged: bool, configuration: Path = CONFIGURATION) -> Check:
    """Report whether a mount can be shown to other users (`--allow-other`)."""
    if privileged:
        return Check(GROUP, "other users", "ok", "--allow-other works")
    try:
        lines = configuration.read_text().splitlines()
    except OSError:
        lines = []
    if "user_allow_other" in (line.strip() for line in lines):
        return Check(GROUP, "other users", "ok", f"user_allow_other is in {configuration}")
    limits = "nobody else, root included, can read your mounts"
    remedy = f"echo user_allow_other | sudo tee -a {configuration}"
    return Check(GROUP, "other users", "warn", f"not in {configuration}", limits, remedy)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
