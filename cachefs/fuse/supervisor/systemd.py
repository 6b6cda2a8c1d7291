"""What a service says to systemd and gets from it, without libsystemd.

sd_notify(3) is a datagram to the socket that NOTIFY_SOCKET names. Descriptors that are sent with
FDSTORE=1 stay with systemd when the service dies, and come back as 3, 4, ... with LISTEN_FDS. So
even the death of supervisor and server together leaves the mount's connection open, and whoever
waits in a read waits for the next start.
"""

import array
import os
import socket

_FIRST_DESCRIPTOR = 3
FUSE = "fuse"
_DEVICE = (10, 229)  # /dev/fuse, on every Linux


def notify(*lines: str, keep: int = -1) -> bool:
    """Send a message, with a descriptor to be kept; return whether there was anybody to send to."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    ancillary = []
    if keep >= 0:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [keep]))]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)  # a manager that does not listen must not stop the mount
        try:
            sender.sendmsg(["\n".join(lines).encode()], ancillary, 0, address)
        except OSError:
            return False
    return True


def keep_fuse(device: int) -> bool:
    """Have systemd keep the descriptor of /dev/fuse.

    FDPOLL=0: else systemd polls it, and the kernel wakes who polls /dev/fuse at every request.
    """
    return notify("FDSTORE=1", f"FDNAME={FUSE}", "FDPOLL=0", keep=device)


def drop_fuse() -> bool:
    """Have systemd close the descriptor of /dev/fuse."""
    return notify("FDSTOREREMOVE=1", f"FDNAME={FUSE}")


def kept_fuse() -> int:
    """Return the descriptor of /dev/fuse that systemd kept; -1 without one. Close what is not it.

    The variables are for this process alone: they are removed.
    """
    values = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if values["PID"] != str(os.getpid()) or not values["FDS"].isdigit():
        return -1
    names = values["FDNAMES"].split(":")
    found = -1
    for index in range(int(values["FDS"])):
        descriptor = _FIRST_DESCRIPTOR + index
        os.set_inheritable(descriptor, False)
        if found < 0 and names[index : index + 1] == [FUSE] and _is_fuse(descriptor):
            found = descriptor
        else:
            os.close(descriptor)
    return found


def _is_fuse(descriptor: int) -> bool:
    return os.fstat(descriptor).st_rdev == os.makedev(*_DEVICE)


def watchdog_s() -> float | None:
    """Return how often the service must say WATCHDOG=1; None when it need not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isdigit() else None
