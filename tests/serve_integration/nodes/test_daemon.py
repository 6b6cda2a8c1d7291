"""Processes that outlive who started them; without Ray."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serve_integration.nodes.conftest import eventually, is_alive

from weightstream.errors import ClusterError
from weightstream.serve_integration.nodes.daemon import Daemon, alone, write_private

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print('up', flush=True); time.sleep(600)",
]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path, "agent")
    yield made
    made.stop()


def stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def test_it_is_nobodys_child_in_a_session_of_its_own(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    monkeypatch.setenv("WEIGHTSTREAM_STORE", "/somewhere")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        marker = daemon.start(SLEEP, "key")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    eventually(lambda: "up" in daemon.log.read_text())
    assert daemon.running() == marker
    assert marker.key == "key"
    _, parent, group, session = stat(marker.pid)[:4]
    assert int(group) == int(session) == marker.pid
    assert int(parent) != os.getpid()
    environment = Path(f"/proc/{marker.pid}/environ").read_text()
    assert "WEIGHTSTREAM_STORE=/somewhere" in environment
    assert "RAY_JOB_ID" not in environment
    assert Path(f"/proc/{marker.pid}/oom_score_adj").read_text().strip() == "0"
    blocked = Path(f"/proc/{marker.pid}/status").read_text().partition("SigBlk:")[2].split()[0]
    assert int(blocked, 16) == 0
    assert os.readlink(f"/proc/{marker.pid}/cwd") == "/"
    assert daemon.log.stat().st_mode & 0o777 == 0o600


def test_stop_ends_it_once(daemon: Daemon, tmp_path: Path) -> None:
    marker = daemon.start(SLEEP, "key")
    assert daemon.stop() is True
    assert not is_alive(marker.pid)
    assert daemon.stop() is False
    assert not (tmp_path / "agent.pid").exists()


def test_one_that_ignores_sigterm_is_killed(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightstream.serve_integration.nodes.daemon._END_S", 0.2)
    marker = daemon.start(STUBBORN, "key")
    eventually(lambda: "up" in daemon.log.read_text())
    assert daemon.stop() is True
    assert not is_alive(marker.pid)


def test_a_process_that_got_the_id_since_is_left_alone(daemon: Daemon, tmp_path: Path) -> None:
    marker = daemon.start(SLEEP, "key")
    other = Daemon(tmp_path, "other")
    (tmp_path / "other.pid").write_text(f"{marker.pid} {int(marker.began) - 1} key")
    assert other.running() is None
    assert other.stop() is False
    assert daemon.running() == marker
    (tmp_path / "other.pid").write_text("half a mar")
    assert other.running() is None


def test_what_cannot_run_says_so(daemon: Daemon) -> None:
    marker = daemon.start(["/nonexistent/python", "-m", "nothing"], "key")
    eventually(lambda: daemon.running() is None)
    assert is_alive(marker.pid) is False
    assert "/nonexistent/python" in daemon.tail() or "No such file" in daemon.tail()


def test_the_tail_is_one_line_without_secrets(daemon: Daemon) -> None:
    assert "no log" in daemon.tail()
    daemon.log.write_text("one\n\ntwo\n")
    assert daemon.tail() == "one; two"
    daemon.log.write_text("x\n" * 100 + "Authorization: Bearer abcdefghijkl\n")
    assert "abcdefghijkl" not in daemon.tail()
    assert "\n" not in daemon.tail()


def test_two_do_not_start_daemons_at_once(tmp_path: Path) -> None:
    with alone(tmp_path, 1.0), pytest.raises(ClusterError, match="lock"), alone(tmp_path, 0.0):
        pass
    with alone(tmp_path, 0.0):
        pass


def test_private_files_are_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_private(tmp_path / "token", "secret")
    finally:
        os.umask(before)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "token").read_text() == "secret"
