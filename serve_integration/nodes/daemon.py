"""A process that outlives the Ray worker which started it.

Ray ends a worker's children with it, and those of its session; so a launcher of a few lines forks
once more, in a session of its own, and ends: init adopts the daemon. Before it becomes what it
shall be, the daemon writes down who it is, so that there is no moment at which it runs unknown.
"""

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from weightstream.errors import ClusterError
from weightstream.log import mask_secrets

_LAUNCH_S = 30.0
_END_S = 8.0  # an agent ends within five
_KILLED_S = 5.0
_TAIL_LINES = 4
_TAIL_BYTES = 16 << 10

# A worker runs at nice 15 and is the first to be killed when memory is short. The daemon is no
# worker; where the user may not take these back (nice), it goes on with them. Signals that the
# worker blocks would stay blocked.
_LAUNCHER = """
import os, signal, sys
marker, key, *line = sys.argv[1:]
read, write = os.pipe()
if os.fork():
    os.close(write)
    os.read(read, 1)
    os._exit(0)
os.close(read)
os.setsid()
os.dup2(2, 1)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
try:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")
    os.setpriority(os.PRIO_PROCESS, 0, 0)
except OSError:
    pass
with open("/proc/self/stat", "rb") as file:
    began = file.read().rpartition(b")")[2].split()[19].decode()
with open(marker + ".partial", "w") as file:
    file.write(f"{os.getpid()} {began} {key}")
os.replace(marker + ".partial", marker)
os.execv(line[0], line)
"""


@dataclass(frozen=True, slots=True)
class Marker:
    """Who a daemon is: a process id may be somebody else's by now, with its start time not."""

    pid: int
    began: str
    """In clock ticks after the machine's start, as /proc says it."""
    key: str
    """Names what it was started with."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """One daemon of a folder, by name; its files there are `NAME.pid` and `NAME.log`."""

    folder: Path
    name: str

    @property
    def _marker(self) -> Path:
        return self.folder / f"{self.name}.pid"

    @property
    def log(self) -> Path:
        """Return where its output goes; begun anew at each start."""
        return self.folder / f"{self.name}.log"

    def start(self, line: Sequence[str], key: str) -> Marker:
        """Start a command; raises `ClusterError` when there is nothing to run."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(self._marker), key, *line]
        with open(self.log, "wb", opener=_private) as log:
            try:
                subprocess.run(
                    command, cwd="/", env=environment, stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=log, timeout=_LAUNCH_S, check=True,
                )  # fmt: skip
            except (OSError, subprocess.SubprocessError) as error:
                raise ClusterError(f"cannot start {line[0]}: {error}") from error
        marker = self._read()
        if marker is None:
            raise ClusterError(f"{self.name} did not start: {self.tail()}")
        return marker

    def running(self) -> Marker | None:
        """Return who runs; None when it ended, or was never started."""
        marker = self._read()
        return marker if marker is not None and _began(marker.pid) == marker.began else None

    def stop(self) -> bool:
        """End it, by SIGKILL where SIGTERM is not enough; return whether it ran."""
        marker = self.running()
        if marker is not None:
            _end(marker)
        self._marker.unlink(missing_ok=True)
        return marker is not None

    def tail(self) -> str:
        """Return the last lines of its output as one, without secrets."""
        try:
            text = self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        except OSError as error:
            return f"no log: {error.strerror}"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return mask_secrets("; ".join(lines[-_TAIL_LINES:])) or "it said nothing"

    def _read(self) -> Marker | None:
        try:
            pid, began, key = self._marker.read_text().split()
            return Marker(int(pid), began, key)
        except (FileNotFoundError, ValueError):
            return None


@contextmanager
def alone(folder: Path, limit_s: float) -> Iterator[None]:
    """Be the only one who starts or ends daemons in a folder; `ClusterError` when it takes long."""
    path, deadline_s = folder / "lock", time.monotonic() + limit_s
    with open(path, "ab", opener=_private) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline_s:
                    raise ClusterError(f"{path} is held by another `up` or `down`") from error
            time.sleep(0.05)
        yield


def write_private(path: Path, text: str) -> None:
    """Write a file that only this user can read, at no moment anybody else."""
    with open(path, "w", opener=_private) as file:
        file.write(text)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _began(pid: int) -> str:
    """Return when a process started; "" for one that is gone, or waits to be buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _end(marker: Marker) -> None:
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(marker.pid)
        try:
            if _began(marker.pid) != marker.began:  # the id went to somebody else meanwhile
                return
            for number, limit_s in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _KILLED_S)):
                signal.pidfd_send_signal(descriptor, number)
                if select.select([descriptor], [], [], limit_s)[0]:
                    return
        finally:
            os.close(descriptor)
        raise ClusterError(f"process {marker.pid} does not end, not by SIGKILL either")
