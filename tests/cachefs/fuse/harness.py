"""A real mount of a server in a child process; the test is its supervisor.

    with serving(tmp_path, {"a.bin": 1 << 20}) as mount:
        mount.call("complete", "a.bin")
        (mount.path / "a.bin").read_bytes()
        mount.kill(); mount.restart()

The test holds /dev/fuse, so a killed server leaves its readers waiting for the next one. Nothing
can stay stuck: after `LIMIT_S` a watchdog ends the connection, and whoever waits gets an error.
"""

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import pytest
from tests.kit.processes import clean_env

from weightstream.cachefs.fuse import mount_table

LIMIT_S = 90.0
ANSWER_S = 60.0
FAKES = "tests.cachefs.fuse.scenes:fakes"


def why_not() -> str:
    """Return why nothing can be mounted here, or nothing."""
    if os.geteuid() != 0:
        return "mounting with the kernel driver needs root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse: {error.strerror}"
    return ""


def until(condition: Callable[[], object], patience_s: float = 30.0) -> bool:
    """Wait until something is so; False when it does not happen in a long time."""
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def errno_of(call: Callable[[], object]) -> str:
    """Return the name of the error that a call fails with; "" when it does not."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


class Mount:
    """One mount and the server behind it."""

    def __init__(
        self, root: Path, scene: str, arguments: Mapping[str, Any], **options: Any
    ) -> None:
        self.path = root / "mnt"
        self.path.mkdir()
        self.store = root / "store"
        (root / "run").mkdir()
        self._scene = scene
        self._arguments = dict(arguments)
        self._options = {
            "uri": "s3://bucket/models",
            "directory": str(self.path),
            "store": str(self.store),
            "journal": str(root / "run" / "mount"),
            **options,
        }
        self._numbers = count()
        self._log: IO[bytes] = TemporaryFile()  # noqa: SIM115 (closed by `end`)
        self.init: dict[str, Any] | None = None
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._watchdog = threading.Timer(LIMIT_S, self._abort)
        self._watchdog.name = "weightstream-watchdog"
        self._watchdog.daemon = True
        self._watchdog.start()
        self.start()
        mount_table.mount(self._device, str(self.path), "test", allow_other=True)
        self.init = self.call("child.await_ready")

    def start(self) -> None:
        """Start a server; one that follows another goes on where that one ended."""
        self._control, theirs = socket.socketpair()
        self._control.settimeout(ANSWER_S)
        self._lines = self._control.makefile("rw")
        numbers = ["--fuse-fd", str(self._device), "--control-fd", str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.cachefs.fuse.child", *numbers],
                pass_fds=[self._device, theirs.fileno()],
                env=clean_env(),
                stderr=self._log,
            )
        self._send(
            {
                "scene": self._scene,
                "arguments": self._arguments,
                "options": self._options,
                "resume": self.init,
            }
        )

    def restart(self, files: Mapping[str, Any] | None = None) -> None:
        """Start the next server, over other files if there are others by now; wait for it."""
        if files is not None:
            self._arguments["files"] = dict(files)
        self.start()
        self.call("child.await_ready")

    def call(self, name: str, *arguments: object) -> Any:
        """Call a method in the server's process: of the scene, `server.` or `child.`."""
        number = next(self._numbers)
        self._send({"id": number, "call": name, "arguments": arguments})
        while True:
            line = self._lines.readline()
            assert line, f"the server ended\n{self.log()}"
            answer = json.loads(line)
            if answer["id"] == number:
                assert "error" not in answer, f"{name}: {answer['error']}\n{self.log()}"
                return answer["value"]

    def counts(self) -> dict[str, int]:
        """Return how often the kernel asked what."""
        return {op: int(value) for op, value in self.call("child.counts").items()}

    def kill(self) -> None:
        """Kill -9 the server."""
        self.process.kill()
        self.process.wait(30)
        with suppress(OSError):
            self._lines.close()
        self._control.close()

    def log(self) -> str:
        """Return what the servers have written so far."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def end(self) -> None:
        """Unmount and end the server, whatever state both are in."""
        self._watchdog.cancel()
        with suppress(OSError):
            mount_table.unmount(str(self.path), mount_table.MNT_DETACH)
        self.kill()
        os.close(self._device)
        self._log.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        self._lines.write(json.dumps(message) + "\n")
        self._lines.flush()

    def _abort(self) -> None:
        """Give whoever waits an error; the test then fails by itself."""
        os.write(2, f"watchdog: ending {self.path}\n{self.log()}".encode())
        with suppress(OSError):
            mount_table.unmount(str(self.path), mount_table.MNT_FORCE | mount_table.MNT_DETACH)


@contextmanager
def serving(root: Path, files: Mapping[str, Any], **options: Any) -> Iterator[Mount]:
    """Mount fakes; skip the test where that is not possible."""
    arguments = {"directory": str(root / "store"), "files": dict(files)}
    with mounted(root, FAKES, arguments, **options) as mount:
        yield mount


@contextmanager
def mounted(
    root: Path, scene: str, arguments: Mapping[str, Any], **options: Any
) -> Iterator[Mount]:
    """Mount what the function `scene` (`module:name`) makes: it has a tree and a content."""
    if reason := why_not():
        pytest.skip(reason)
    mount = Mount(root, scene, arguments, **options)
    try:
        yield mount
    finally:
        mount.end()


class Reader:
    """A child that runs a snippet against the mount, and may be interrupted or left waiting."""

    def __init__(self, code: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=clean_env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def line(self) -> str:
        """Return the next line that it says."""
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        assert poll.poll(ANSWER_S * 1000), "it says nothing"
        line = self._process.stdout.readline().decode()
        assert line, self._process.communicate(timeout=ANSWER_S)[1].decode()
        return line.rstrip("\n")

    def tell(self, line: str = "") -> None:
        """Send it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end and return its exit code."""
        return self._process.wait(ANSWER_S)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate(timeout=ANSWER_S)
