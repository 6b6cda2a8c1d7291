"""What of /dev/fuse and the system around it is not a message: ioctls, readahead, limits.

Nothing here looks at what is mounted: whoever serves a mount must never wait for it.
"""

import ctypes
import errno
import fcntl
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from weightstream.cachefs.fuse.kernel.wire import BACKING_MAP
from weightstream.cachefs.fuse.mount_table import mounted_at

log = logging.getLogger(__name__)

_BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
_BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)
_OVERLAYFS = 0x794C7630
_READ_AHEAD_TIMEOUT_S = 2.0
_LIMITS = Path("/proc/sys/fs/fuse")


def backing_open(device: int, backing: int) -> int:
    """Register an open file with the connection; return its id. Raises `OSError`.

    EPERM without CAP_SYS_ADMIN in the first user namespace or where passthrough was not agreed
    upon, ELOOP on a file system that is stacked too high, ENOTTY before Linux 6.9.
    """
    # A mutable buffer: with bytes, fcntl.ioctl returns the buffer instead of the id.
    request = bytearray(BACKING_MAP.pack(backing, 0, 0))
    return int(fcntl.ioctl(device, _BACKING_OPEN, request, True))


def backing_close(device: int, backing_id: int) -> None:
    """Let the connection forget a file; what is open goes on. Raises `OSError`."""
    fcntl.ioctl(device, _BACKING_CLOSE, bytearray(backing_id.to_bytes(4, "little")), True)


def passthrough_refused(device: int, directory: Path) -> OSError | None:
    """Try to register a file of a directory; return what was said against it."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            backing_close(device, backing_open(device, file.fileno()))
    except OSError as error:
        return error
    return None


def stack_depth(directory: Path) -> int:
    """Return how deep a stack of file systems backing files there make.

    A mount of depth 2 cannot be the lower layer of an overlay, so it is not always asked for.
    """
    return 2 if _file_system(directory) == _OVERLAYFS else 1


def _file_system(directory: Path) -> int:
    """Return the magic number that statfs(2) begins with; 0 when it cannot be told."""
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(directory), buffer) != 0:
        return 0
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def request_timeout_s(limits: Path = _LIMITS) -> int | None:
    """Return after how long the kernel ends a connection that left a request unanswered."""
    found = []
    for name in ("default_request_timeout", "max_request_timeout"):
        try:
            found.append(int((limits / name).read_text()))
        except (OSError, ValueError):  # before Linux 6.15
            continue
    return min((limit for limit in found if limit > 0), default=None)


def set_read_ahead(directory: str, wanted_bytes: int) -> None:
    """Set how far the kernel reads ahead in a mount; say so when it cannot be done.

    INIT can only lower it (measured on 6.18: 16 MiB asked for, 128 KiB given), and at 128 KiB a
    mapped file arrives in eight times as many requests. Writing to sysfs can hang with the device
    behind it, so it has a thread of its own.
    """
    _within(_READ_AHEAD_TIMEOUT_S, lambda: _set_read_ahead(directory, wanted_bytes))


def _set_read_ahead(directory: str, wanted_bytes: int) -> None:
    mounted = mounted_at(directory)
    if mounted is None or not mounted.is_ours:
        log.debug("no readahead to set: %s is not mounted", directory)
        return
    path = f"/sys/class/bdi/{mounted.device}/read_ahead_kb"
    try:
        Path(path).write_text(str(wanted_bytes >> 10))
    except OSError as error:
        advice = f"as root: echo {wanted_bytes >> 10} > {path}"
        log.warning("cannot set the readahead of %s: %s; %s", directory, error.strerror, advice)


def _within(limit_s: float, work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, daemon=True, name="weightstream-read-ahead")
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        log.warning("setting the readahead has not ended within %g s", limit_s)


def is_gone(error: OSError) -> bool:
    """Say whether reading /dev/fuse failed because the file system is not mounted any more."""
    return error.errno in (errno.ENODEV, errno.ECONNABORTED, errno.EPERM)
