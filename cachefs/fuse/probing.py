"""Tries out what this machine lets a mount do: `python -m weightstream.cachefs.fuse.probing STORE`.

It mounts for real, agrees with the kernel and registers a file of the store's disk for passthrough;
a version of Linux or a capability would only hint at the answer. The mount is in a mount namespace
of this process, so nobody sees it, and it is gone with the process, which serves nobody and must
never be looked into.
"""

import ctypes
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.kernel import device, handshake, wire
from weightstream.cachefs.fuse.kernel.connection import Connection
from weightstream.cachefs.fuse.supervisor.attachment import DEVICE
from weightstream.errors import WeightstreamError

_CLONE_NEWNS = 0x00020000
_READ_AHEAD_KB = 256  # any value but the kernel's own 128
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Probed:
    """What was found; empty where all is well."""

    mount: str = ""
    passthrough: str = ""
    read_ahead: str = ""


def probe(store: Path) -> Probed:
    """Mount in a namespace of this process's own, and try. Call it in a process made for it."""
    try:
        _enter_namespace()
        with tempfile.TemporaryDirectory(prefix="weightstream-probe-") as directory:
            return _tried(directory, store)
    except (OSError, WeightstreamError) as error:
        return Probed(_why(error), "not tried", "not tried")


def _tried(directory: str, store: Path) -> Probed:
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        mount_table.mount(fd, directory, "weightstream-probe", allow_other=False)
        try:
            _agree(fd, device.stack_depth(store))
            refused = device.passthrough_refused(fd, store)
            return Probed("", _why(refused) if refused else "", _read_ahead(directory))
        finally:
            mount_table.unmount(directory, mount_table.MNT_DETACH)
    finally:
        os.close(fd)


def _agree(fd: int, stack_depth: int) -> None:
    """Answer INIT as a server does."""
    request = wire.parse_request(os.read(fd, 64 << 10))
    answer = handshake.answer(wire.offer_of(request), stack_depth)
    Connection(fd).reply(request.unique, [wire.init_out(answer)])


def _read_ahead(directory: str) -> str:
    """Return why the readahead of a mount cannot be set."""
    mounted = mount_table.mounted_at(directory)
    if mounted is None:
        return "the mount is not in the table"
    path = Path(f"/sys/class/bdi/{mounted.device}/read_ahead_kb")
    try:
        path.write_text(str(_READ_AHEAD_KB))
        found = path.read_text().strip()
    except OSError as error:
        return _why(error)
    return "" if found == str(_READ_AHEAD_KB) else f"it stays at {found} KiB"


def _enter_namespace() -> None:
    if _LIBC.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    # What is mounted from here on is not passed on to the namespace that we came from.
    private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC
    if _LIBC.mount(None, b"/", None, ctypes.c_ulong(private), None) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)


if __name__ == "__main__":
    print(json.dumps(asdict(probe(Path(sys.argv[1])))))
