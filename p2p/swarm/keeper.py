"""The swarm's process as the agent sees it: started, spoken to, started again when it dies, until
it has died too often.

While it is down nothing waits for it: what is sent goes nowhere, and `on_change` has said so.
"""

import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from weightstream.cachefs.fuse.supervisor.backoff import Backoff
from weightstream.cachefs.fuse.supervisor.children import python
from weightstream.errors import WeightstreamError
from weightstream.p2p.swarm.frames import FrameError, Message, receive, send

log = logging.getLogger(__name__)

_START_S = 30.0
_SILENT_S = 5.0
"""It says something four times a second, and takes a piece in a millisecond."""
_END_S = 5.0
_MOST_DEATHS = 6
"""In a row, each less than a minute after the one before: then what kills it does not go away."""


@dataclass(frozen=True, slots=True)
class Start:
    """What the process is told first."""

    listen: str
    authority: str = ""
    """With certificate and key, in PEM: who takes part has one of this authority."""
    certificate: str = ""
    private_key: str = ""

    def __repr__(self) -> str:
        return f"Start({self.listen})"


class Keeper:
    """Thread-safe; close it."""

    def __init__(
        self, start: Start, hear: Callable[[Message], None], on_change: Callable[[], None]
    ) -> None:
        """Start the process; raises `WeightstreamError` when it cannot listen."""
        self._start = start
        self._hear = hear
        self._on_change = on_change
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sock: socket.socket | None = None
        self.pid = 0
        self.port = 0
        process, sock = self._spawn()
        self._thread = threading.Thread(
            target=self._keep, args=(process, sock), daemon=True, name="weightstream-swarm"
        )
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Say whether the process runs and listens."""
        return self._sock is not None

    def tell(self, message: dict[str, Any], payload: bytes | memoryview = b"") -> bool:
        """Send a message; False when the process is down."""
        with self._lock:
            if self._sock is None:
                return False
            try:
                send(self._sock, message, payload)
                return True
            except OSError as error:
                log.info("the swarm's process takes no message: %s", error)
                _hang_up(self._sock)  # half a message may have gone: it is of no use any more
                self._sock = None
                return False

    def close(self) -> None:
        """End the process."""
        self._closing.set()
        with self._lock:
            sock, self._sock = self._sock, None
        if sock is not None:
            _hang_up(sock)
        self._thread.join(_END_S)

    def _spawn(self) -> tuple["subprocess.Popen[bytes]", socket.socket]:
        """Start the process; return when it listens, on the same port each time."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                python("weightstream.p2p.swarm.process", str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        try:
            ours.settimeout(_START_S)
            listen = self._start.listen
            if self.port:
                listen = f"{listen.rpartition(':')[0]}:{self.port}"
            send(ours, asdict(self._start) | {"listen": listen})
            self.port = self._wait_ready(ours, listen)
            ours.settimeout(_SILENT_S)
        except BaseException:
            ours.close()
            _end(process)
            raise
        with self._lock:
            self._sock = None if self._closing.is_set() else ours
        if self._sock is None:
            ours.close()
            _end(process)
            raise WeightstreamError("the swarm was closed")
        self.pid = process.pid
        return process, ours

    def _wait_ready(self, sock: socket.socket, listen: str) -> int:
        failure = f"cannot serve the swarm at {listen}"
        try:
            while (got := receive(sock)) is not None:
                if got[0]["event"] == "ready":
                    return int(got[0]["port"])
                if got[0]["event"] == "refused":
                    raise WeightstreamError(f"{failure}: {got[0]['why']}")
        except OSError as error:
            raise WeightstreamError(f"{failure}: its process is silent") from error
        raise WeightstreamError(f"{failure}: its process ended")

    # Its thread

    def _keep(self, process: "subprocess.Popen[bytes]", sock: socket.socket) -> None:
        backoff, began_s = Backoff(), time.monotonic()
        why = self._listen(process, sock)
        while not self._closing.is_set():
            level = logging.INFO if backoff.failures else logging.WARNING
            wait_s, backoff = backoff.after(time.monotonic() - began_s)
            if backoff.failures >= _MOST_DEATHS:
                text = "the swarm's process ended %d times in a row (%s): it stays down"
                log.warning(text, backoff.failures, why)
                return
            log.log(level, "the swarm's process ended (%s): bulk goes over the exchange", why)
            if self._closing.wait(wait_s):
                return
            began_s = time.monotonic()
            try:
                process, sock = self._spawn()
            except WeightstreamError as error:
                why = str(error)
                continue
            log.info("the swarm's process runs again: %d", process.pid)
            self._on_change()
            why = self._listen(process, sock)

    def _listen(self, process: "subprocess.Popen[bytes]", sock: socket.socket) -> str:
        """Hear what it says until it ends; return how it ended."""
        why = ""
        try:
            while (got := receive(sock)) is not None:
                self._hear(got[0])
        except (OSError, FrameError) as error:
            why = str(error) or "silent"
        except Exception as error:
            log.exception("unexpected, from the swarm's process")
            why = repr(error)
        with self._lock:
            self._sock = None
        sock.close()
        ended = _end(process)
        if not self._closing.is_set():
            self._on_change()
        return f"{why}; {ended}" if why else ended


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):  # it did
        sock.shutdown(socket.SHUT_RDWR)


def _end(process: "subprocess.Popen[bytes]") -> str:
    """Wait for a process that has no work any more; return how it ended."""
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait(_END_S)
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
