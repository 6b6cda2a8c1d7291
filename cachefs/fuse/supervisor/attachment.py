"""How a mount hangs in the kernel: what differs between the drivers, for their supervisor.

kernel        the supervisor opens /dev/fuse, mounts, and keeps the descriptor: the connection
              outlives every server. It ends when nobody holds the descriptor, or by umount.
fuse-python   libfuse in the server mounts by itself; the connection is gone with the server.
"""

import errno
import os
import select
from typing import Protocol

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.mounts import MountSpec
from weightstream.errors import MountError

DEVICE = "/dev/fuse"
FUSERMOUNTS = ("fusermount3", "fusermount")
_FUSERMOUNT_TIMEOUT_S = 2.0


class Attachment(Protocol):
    """One mount's connection to the kernel."""

    outlives_server: bool
    """Whether another server can go on where a dead one stopped."""

    device: int
    """The descriptor of /dev/fuse to be kept; -1 when there is none."""

    def open(self) -> None:
        """Get ready for a server. Raises `MountError`."""

    def attach(self) -> None:
        """Mount, once a server is prepared. Raises `MountError`."""

    def is_alive(self) -> bool:
        """Return whether anybody can still ask through it."""
        ...

    def is_visible(self) -> bool:
        """Return whether it is in the table of mounts."""
        ...

    def detach(self, lazy: bool) -> None:
        """Unmount; lazily, so that only those who have files open still see it.

        Raises `OSError`, EBUSY when it is in use.
        """

    def abort(self) -> None:
        """End the connection, whoever waits for it."""

    def close(self) -> None:
        """Let go of it."""


def attachment(spec: MountSpec, source: str) -> Attachment:
    """Return the attachment that a mount's driver needs."""
    if spec.driver == "kernel":
        return KernelAttachment(spec, source)
    return LibfuseAttachment(spec)


class KernelAttachment:
    """A descriptor of /dev/fuse and the mount made with it."""

    outlives_server = True

    def __init__(self, spec: MountSpec, source: str, device: int = -1) -> None:
        """`device` is what an earlier supervisor had; it is mounted already."""
        self._spec = spec
        self._source = source
        self.device = device
        self._minor = self._find_minor() if device >= 0 else -1

    def open(self) -> None:
        """Open /dev/fuse; remove what a dead supervisor left, or it would stay below."""
        try:
            if self._find_minor() >= 0:
                mount_table.unmount(self._spec.directory, mount_table.MNT_DETACH)
            self.device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MountError(f"cannot begin with {DEVICE}: {error.strerror}") from error

    def attach(self) -> None:
        """Mount with the descriptor."""
        directory = self._spec.directory
        try:
            mount_table.mount(self.device, directory, self._source, self._spec.allow_other)
        except OSError as error:
            raise MountError(f"cannot mount at {directory}: {error.strerror}") from error
        self._minor = self._find_minor()

    def is_alive(self) -> bool:
        """Ask the descriptor; it says POLLERR once the last mount is gone or it was aborted.

        Not to be watched in a loop: the kernel wakes whoever polls at every request.
        """
        if self.device < 0 or self._minor < 0:
            return False
        poll = select.poll()
        poll.register(self.device, 0)
        return not poll.poll(0)

    def is_visible(self) -> bool:
        """Return whether our connection is mounted at the directory."""
        return 0 <= self._find_minor() == self._minor

    def detach(self, lazy: bool) -> None:
        """Unmount by the system call."""
        if self.is_visible():
            flags = mount_table.MNT_DETACH if lazy else 0
            mount_table.unmount(self._spec.directory, flags)

    def abort(self) -> None:
        """End the connection through the mount, else through the control file system."""
        if self.is_visible():
            flags = mount_table.MNT_FORCE | mount_table.MNT_DETACH
            mount_table.unmount(self._spec.directory, flags)
        elif self.is_alive():
            mount_table.abort(self._minor)

    def close(self) -> None:
        """Close the descriptor; with the server's gone, too, the connection ends."""
        if self.device >= 0:
            os.close(self.device)
        self.device = self._minor = -1

    def _find_minor(self) -> int:
        found = mount_table.mounted_at(self._spec.directory)
        return found.minor if found is not None and found.is_ours else -1


class LibfuseAttachment:
    """A mount that the server makes through fusermount and that dies with it."""

    outlives_server = False
    device = -1

    def __init__(self, spec: MountSpec) -> None:
        self._directory = spec.directory

    def open(self) -> None:
        """Remove what a dead server left, or libfuse could not mount."""
        if self.is_visible():
            self.detach(lazy=True)

    def attach(self) -> None:
        """Leave it to the server."""

    def is_alive(self) -> bool:
        """Return whether it is mounted."""
        return self.is_visible()

    def is_visible(self) -> bool:
        """Return whether the directory has a mount of ours."""
        found = mount_table.mounted_at(self._directory)
        return found is not None and found.is_ours

    def detach(self, lazy: bool) -> None:
        """Unmount by the system call where permitted, else by fusermount."""
        if not self.is_visible():
            return
        if mount_table.privileged():
            mount_table.unmount(self._directory, mount_table.MNT_DETACH if lazy else 0)
        else:
            fusermount(self._directory, lazy)

    def abort(self) -> None:
        """Unmount lazily; the connection itself ends with the server."""
        self.detach(lazy=True)

    def close(self) -> None:
        """Hold nothing."""


def fusermount(directory: str, lazy: bool) -> None:
    """Unmount as an ordinary user. Raises `OSError`."""
    import shutil
    import subprocess  # 2 MiB that the kernel driver's supervisor never needs

    program = next(filter(None, map(shutil.which, FUSERMOUNTS)), None)
    if program is None:
        raise OSError(errno.ENOENT, "fusermount is missing")
    command = [program, "-u", *(["-z"] if lazy else []), "--", directory]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_FUSERMOUNT_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, "fusermount does not answer") from error
    if done.returncode:
        busy = "busy" in done.stderr
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise OSError(errno.EBUSY if busy else errno.EIO, said)
