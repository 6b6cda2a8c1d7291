"""The agent's process: one for each run directory, from its start to SIGTERM."""

import fcntl
import os
import select
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from weightstream.cachefs.agent.finding import CONTROL_SOCKET, SOCKET
from weightstream.cachefs.fuse.supervisor import systemd
from weightstream.errors import UsageError
from weightstream.log import get_logger

log = get_logger(__name__)

_LOCK = "agent.lock"
_CLOSE_S = 4.0


class Lock:
    """Held by the agent of a run directory; the kernel frees it, however the agent ends."""

    def __init__(self, directory: Path) -> None:
        """Take it; raises `UsageError` that names the process which has it."""
        path = directory / _LOCK
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise UsageError(f"an agent runs in {directory} already: process {pid}") from error
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Give it back; the file stays, for a file that is removed can be locked twice."""
        os.close(self._descriptor)


def forget_sockets(directory: Path) -> None:
    """Remove the agent's sockets, so that nobody tries them."""
    for name in (SOCKET, CONTROL_SOCKET):
        with suppress(FileNotFoundError):
            (directory / name).unlink()


class Signals:
    """SIGTERM and SIGINT as something to wait for. Made on the main thread."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._name = ""

    def wait(self, ended: Callable[[], bool] = lambda: False) -> str:
        """Return the name of the signal that came, or "" when `ended`; `wake` has it look.

        The agent pets systemd's watchdog meanwhile.
        """
        every_s = systemd.watchdog_s()
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        while not self._name and not ended():
            poll.poll(None if every_s is None else every_s * 1000)
            if every_s is not None:
                systemd.notify("WATCHDOG=1")
            with suppress(BlockingIOError):
                os.read(self._read, 64)
        return self._name

    def wake(self) -> None:
        """Have `wait` look whether it is over; from any thread."""
        with suppress(BlockingIOError):  # full: it wakes up anyway
            os.write(self._write, b"\0")

    def _heard(self, number: int, _: object) -> None:
        self._name = signal.Signals(number).name


class Aside:
    """Work on a thread of its own, while the main thread listens for signals."""

    def __init__(self, work: Callable[[], None], ended: Callable[[], None]) -> None:
        self._work = work
        self._ended = ended
        self._error: BaseException | None = None
        self.is_over = False
        threading.Thread(target=self._run, daemon=True, name="weightstream-mounting").start()

    def check(self) -> None:
        """Raise what went wrong in it."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self.is_over = True
            self._ended()


def close_within(closes: Sequence[Callable[[], None]], limit_s: float = _CLOSE_S) -> bool:
    """Run these one after the other; return whether they ended in time."""

    def run() -> None:
        for close in closes:
            try:
                close()
            except Exception:  # the next must be closed all the same
                log.exception("unexpected, closing")

    thread = threading.Thread(target=run, daemon=True, name="weightstream-close")
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()
