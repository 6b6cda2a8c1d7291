"""Child processes for a process that must stay small: spawned without fork, watched by pidfd."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence

# Python ignores SIGPIPE, and that is inherited; the others are the supervisor's own business.
_DEFAULT = (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# What systemd tells its service is not for the service's children.
_OF_SERVICE = {"NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}
_OF_SERVICE |= {"WATCHDOG_USEC", "WATCHDOG_PID"}


class Child:
    """A process that is ours to reap."""

    def __init__(self, pid: int) -> None:
        """Take a child of this process, also one that it had before an exec."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.exit_code: int | None = None

    @classmethod
    def spawn(
        cls, command: Sequence[str], keep: Sequence[int] = (), quiet: bool = False
    ) -> "Child":
        """Start a program in a session of its own, with these descriptors beside 1 and 2."""
        actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        if quiet:
            actions += [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_WRONLY, 0) for n in (1, 2)]
        for descriptor in keep:
            os.set_inheritable(descriptor, True)
        try:
            pid = os.posix_spawn(
                command[0],
                list(command),
                environment(),
                file_actions=actions,
                setsid=True,
                setsigmask=[],
                setsigdef=_DEFAULT,
            )
        finally:
            for descriptor in keep:
                os.set_inheritable(descriptor, False)
        return cls(pid)

    def ended(self) -> bool:
        """Return whether it has ended; reap it then."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code is not None

    def kill(self) -> None:
        """Send SIGKILL if it has not ended."""
        if not self.ended():
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def ending(self) -> str:
        """Say how it ended: `exit status 1`, `SIGKILL`."""
        code = self.exit_code
        if code is None:
            return "still running"
        if code >= 0:
            return f"exit status {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:  # a real-time signal
            return f"signal {-code}"

    def close(self) -> None:
        """Forget it."""
        os.close(self.pidfd)


def environment() -> Mapping[str, str]:
    """Return this process's environment without what is for it alone."""
    return {name: value for name, value in os.environ.items() if name not in _OF_SERVICE}


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of ours.

    -P: else the current directory would come first in sys.path, and a json.py in it before json.
    """
    return [sys.executable, "-P", "-m", module, *arguments]
