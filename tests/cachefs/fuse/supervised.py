"""Mounts with a supervisor in the background, and nothing of them left after the test."""

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.cachefs.fuse import fake_server
from tests.kit.processes import PRELUDE, Child

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.mount_table import MNT_DETACH, MNT_FORCE, mounted_at
from weightstream.cachefs.fuse.mounts import MountSpec, Record, RunDirectory, started
from weightstream.cachefs.fuse.supervisor import launching
from weightstream.cachefs.fuse.supervisor.handover import Job
from weightstream.cachefs.fuse.supervisor.server_process import Limits
from weightstream.cachefs.fuse.supervisor.starting import free_directory, why_not_kernel

SOURCE = "fake://models"
PROGRAM = (sys.executable, str(Path(fake_server.__file__).resolve()))

needs_mount = pytest.mark.skipif(bool(why_not_kernel()), reason=why_not_kernel() or "it works")


def eventually(happened: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Wait until something is so."""
    deadline_s = time.monotonic() + timeout_s
    while not happened():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    return started(pid) != 0


@dataclass(slots=True)
class Sandbox:
    """A directory to mount at, a run directory, and who has run there."""

    base: Path
    seen: set[int] = field(default_factory=set)

    @property
    def directory(self) -> str:
        return str(self.base / "mnt")

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.base / "run")

    @property
    def log(self) -> str:
        path = self.base / "log"
        return path.read_text() if path.exists() else ""

    @property
    def data(self) -> Path:
        return Path(self.directory) / "data"

    def job(self, limits: Limits | None = None, **settings: Any) -> Job:
        """Return the job of a mount with the fake server."""
        return Job(
            spec=MountSpec(SOURCE, self.directory, "kernel", settings),
            run=str(self.run.path),
            source=SOURCE,
            log=str(self.base / "log"),
            program=PROGRAM,
            limits=limits or Limits(),
        )

    def start(self, limits: Limits | None = None, **settings: Any) -> dict[str, Any]:
        """Mount in the background; return the supervisor's report."""
        free_directory(self.run, self.directory, SOURCE)
        report = launching.start(self.job(limits, **settings))
        self.look()
        return report

    def ask(self, command: str, **fields: Any) -> dict[str, Any]:
        """Ask the supervisor."""
        return self.run.ask(self.directory, {"command": command, **fields}, timeout_s=60)

    def record(self) -> Record:
        """Return what the supervisor noted; remember who runs."""
        record = self.run.record(self.directory)
        assert record is not None
        self.seen |= {record.supervisor_pid, record.server_pid} - {0}
        return record

    def look(self) -> None:
        with suppress(AssertionError):
            self.record()

    def is_mounted(self) -> bool:
        found = mounted_at(self.directory)
        return found is not None and found.is_ours

    def wait_ready(self, restarts: int) -> Record:
        """Wait until a server serves after so many restarts."""

        def ready() -> bool:
            record = self.record()
            return record.state == "ready" and record.restarts >= restarts

        eventually(ready, f"{restarts} restarts")
        return self.record()

    def wait_gone(self, timeout_s: float = 30.0) -> None:
        """Wait until neither mount nor processes are left."""
        eventually(lambda: not self.is_mounted(), "unmounted", timeout_s)
        eventually(lambda: not any(map(is_running, self.seen)), "ended", timeout_s)
        assert self.run.records() == []

    def clean(self) -> None:
        """Leave nothing."""
        self.look()
        for pid in self.seen:
            if _is_ours(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        while self.is_mounted():
            mount_table.unmount(self.directory, MNT_DETACH | MNT_FORCE)


def _is_ours(pid: int) -> bool:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"supervisor" in line or b"fake_server" in line or b"fuse.serve" in line


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """Return a place to mount at."""
    box = Sandbox(tmp_path)
    (tmp_path / "mnt").mkdir()
    box.run.prepare()
    try:
        yield box
    finally:
        box.clean()


_READ = """
import hashlib, sys
emit("begun")
while True:
    try:
        with open(sys.argv[1], "rb") as file:
            emit(hashlib.sha256(file.read()).hexdigest())
    except OSError as error:
        emit(error.strerror)
    if sys.argv[2] == "once":
        break
"""


class Reader(Child):
    """A process that reads a file once, or again and again.

    Not a thread of the test: a fork of a process that has a file open waits for the file system
    (measured: for ever, when that is dead), for the child closes what it inherited.
    """

    def __init__(self, path: Path, how: str = "once") -> None:
        super().__init__([sys.executable, "-c", PRELUDE + _READ, str(path), how])
        self.wait_for(lambda: bool(self.values()))

    def outcome(self) -> str:
        """Return the digest of what it read, or the error; wait for it."""
        return str(self.result().values[-1])

    def reads(self) -> list[str]:
        """Return the outcomes so far."""
        return [str(value) for value in self.values()[1:]]


DIGEST = hashlib.sha256(fake_server.content()).hexdigest()
