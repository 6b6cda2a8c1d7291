"""A mount as a service of systemd: readiness, the descriptor that outlives everybody, SIGTERM."""

import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cachefs.fuse.fake_server import content
from tests.cachefs.fuse.supervised import (
    DIGEST,
    Reader,
    Sandbox,
    eventually,
    is_running,
    needs_mount,
    sandbox,
)
from tests.kit.processes import clean_env

from weightstream.cachefs.fuse import mount_table
from weightstream.cachefs.fuse.supervisor.handover import Job, command

__all__ = ["sandbox"]

pytestmark = [pytest.mark.fuse, needs_mount]


_AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.close(int(sys.argv[1]))
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


class Manager:
    """What of systemd a service sees."""

    def __init__(self, base: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(base / "notify"))
        self._socket.settimeout(30)
        self._address = str(base / "notify")
        self.kept = -1
        self.said: list[str] = []
        self.services: list[subprocess.Popen[bytes]] = []

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        """Start the service; give it back what it had kept, as number 3, as systemd does."""
        line, descriptor = command(replace(job, log=""))
        high = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 50)
        os.close(descriptor)
        line[line.index("--job-fd") + 1] = str(high)
        env = {"NOTIFY_SOCKET": self._address}
        if self.kept >= 0:
            env |= {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "fuse"}
            line = [line[0], "-c", _AS_SYSTEMD, str(self.kept), *line]
        service = subprocess.Popen(
            line,
            env=clean_env(env),
            pass_fds=[number for number in (high, self.kept) if number >= 0],
            stdin=subprocess.DEVNULL,
        )
        os.close(high)
        self.services.append(service)
        return service

    def wait_for(self, text: str) -> None:
        """Read what the service says until it says this."""
        while not any(text in one for one in self.said):
            message, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 4)
            self.said.append(message.decode())
            if descriptors or b"FDSTOREREMOVE=1" in message:
                self.drop()
            for descriptor in descriptors:
                self.kept = descriptor

    def drop(self) -> None:
        """Close what was kept."""
        if self.kept >= 0:
            os.close(self.kept)
        self.kept = -1

    def close(self) -> None:
        for service in self.services:
            if service.poll() is None:
                service.kill()
            service.wait(30)
        self.drop()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    running = Manager(tmp_path)
    yield running
    running.close()


def test_says_when_it_is_ready_and_when_it_stops(sandbox: Sandbox, manager: Manager) -> None:
    service = manager.start(sandbox.job())
    manager.wait_for("READY=1")
    assert sandbox.data.read_bytes() == content()
    assert manager.kept >= 0
    sandbox.look()
    manager.said.clear()
    service.send_signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1")
    manager.wait_for("FDSTOREREMOVE=1")
    assert service.wait(30) == 0
    assert manager.kept < 0
    sandbox.wait_gone()


def test_says_why_it_does_not_start(sandbox: Sandbox, manager: Manager) -> None:
    service = manager.start(sandbox.job(failed="no such bucket"))
    manager.wait_for("STATUS=no such bucket")
    assert service.wait(30) == 3
    assert not sandbox.is_mounted()


def test_mount_survives_the_death_of_everybody(sandbox: Sandbox, manager: Manager) -> None:
    first = manager.start(sandbox.job(delay_s=0.1))
    manager.wait_for("FDSTORE=1")
    manager.wait_for("READY=1")
    record = sandbox.wait_ready(0)
    with Reader(sandbox.data) as reader:
        time.sleep(0.05)
        for pid in (record.supervisor_pid, record.server_pid):
            os.kill(pid, signal.SIGKILL)
        first.wait(30)
        eventually(lambda: not is_running(record.server_pid), "killed")
        assert not reader.reads()
        manager.said.clear()
        manager.start(sandbox.job(delay_s=0.1))
        manager.wait_for("READY=1")
        assert reader.outcome() == DIGEST
    assert sandbox.wait_ready(1).restarts == 1


def test_kept_descriptor_that_nobody_knows_of_is_let_go(sandbox: Sandbox, manager: Manager) -> None:
    first = manager.start(sandbox.job())
    manager.wait_for("FDSTORE=1")
    manager.wait_for("READY=1")
    record = sandbox.wait_ready(0)
    for pid in (record.supervisor_pid, record.server_pid):
        os.kill(pid, signal.SIGKILL)
    first.wait(30)
    sandbox.run.forget(sandbox.directory)
    manager.said.clear()
    manager.start(sandbox.job())
    manager.wait_for("READY=1")
    with Reader(sandbox.data) as reader:
        assert reader.outcome() == DIGEST
    assert sum(one.directory == sandbox.directory for one in mount_table.mounts()) == 1
