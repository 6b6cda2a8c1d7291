"""`weightstream agent` as its user meets it: start, refusals, mounts, prefetch, end."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Cli, check
from tests.kit.models import random_bytes
from tests.kit.processes import Child
from tests.kit.s3 import S3Server

from weightstream.cachefs.fuse.supervisor.starting import why_not_kernel
from weightstream.cli.agents import _address, _mount
from weightstream.errors import UsageError

needs_mount = pytest.mark.skipif(bool(why_not_kernel()), reason=why_not_kernel() or "it works")

MIB = 1 << 20
DATA = random_bytes(5 * MIB, "agent")
URI = "s3://models/cli-agent"

Start = Callable[..., Child]


@pytest.fixture
def node(s3_cli: Cli, tmp_path: Path) -> Cli:
    """Return a runner whose run directory is the test's own."""
    s3_cli.env["WEIGHTSTREAM_RUN_DIRECTORY"] = str(tmp_path / "run")
    return s3_cli


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def model(s3: S3Server) -> str:
    s3.put_files("models/cli-agent", {"model.safetensors": DATA, "config.json": b"{}"})
    return URI


def wait_ready(agent: Child) -> None:
    agent.wait_for(lambda: "is ready in" in agent.stderr())


def end(agent: Child) -> None:
    """End it by SIGTERM, which takes less than five seconds."""
    began_s = time.monotonic()
    os.kill(agent.pid, signal.SIGTERM)
    outcome = agent.result(10)
    check(outcome)
    assert outcome.returncode == 0
    assert time.monotonic() - began_s < 5


def test_it_says_when_it_is_ready_and_ends_on_sigterm(
    node: Cli, start: Start, run_directory: Path
) -> None:
    with start("agent") as agent:
        wait_ready(agent)
        assert (run_directory / "agent.sock").is_socket()
        assert (run_directory / "agent.sock").stat().st_mode & 0o777 == 0o600
        assert (run_directory / "agent-control.sock").stat().st_mode & 0o777 == 0o600
        assert run_directory.stat().st_mode & 0o777 == 0o700
        end(agent)
    assert not (run_directory / "agent.sock").exists()


def test_it_tells_systemd(node: Cli, start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        node.env |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        with start("agent") as agent:
            assert manager.recv(4096).startswith(b"READY=1\n")
            assert manager.recv(4096) == b"WATCHDOG=1"
            end(agent)
            said_last = b"WATCHDOG=1"
            while said_last == b"WATCHDOG=1":
                said_last = manager.recv(4096)
            assert said_last == b"STOPPING=1"


def test_a_second_one_is_refused_by_the_first_ones_pid(node: Cli, start: Start) -> None:
    with start("agent") as agent:
        wait_ready(agent)
        line = node.error("agent", code=2)
        assert f"process {agent.pid}" in line
        end(agent)


def test_it_replaces_what_a_killed_one_left(node: Cli, start: Start, run_directory: Path) -> None:
    with start("agent") as agent:
        wait_ready(agent)
        agent.kill()
    assert (run_directory / "agent.sock").is_socket()
    with start("agent") as agent:
        wait_ready(agent)
        end(agent)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--mount", "s3://models"), "ORIGIN:DIRECTORY"),
        (("--mount", "/mnt/models"), "ORIGIN:DIRECTORY"),
        (("--allow", "/var/models"), "on this machine"),
        (("--api", "127.0.0.1:0"), "--api-token-file"),
        (("--api", "127.0.0.1", "--api-token-file", "/dev/null"), "HOST:PORT"),
        (("--api", "127.0.0.1:0", "--api-token-file", "/dev/null"), "token"),
        (("--api", "127.0.0.1:0", "--api-token-file", "/nonexistent"), "/nonexistent"),
        (("-o", "store=/proc/nothing"), "/proc/nothing"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    node: Cli, arguments: tuple[str, ...], word: str
) -> None:
    code = 6 if arguments[0] == "-o" else 2
    assert word in node.error("agent", *arguments, code=code)


def test_a_port_that_is_taken_is_named(node: Cli, tmp_path: Path, s3: S3Server) -> None:
    token = tmp_path / "token"
    token.write_text("x" * 32)
    line = node.error("agent", "--api", f"127.0.0.1:{s3.port}", "--api-token-file", token, code=2)
    assert str(s3.port) in line


def test_a_mount_that_cannot_be_made_ends_it(node: Cli, tmp_path: Path) -> None:
    outcome = node("agent", "--mount", f"{URI}:{tmp_path / 'missing'}", code=2)
    assert "missing" in outcome.stderr


def test_prefetch_asks_the_agent(node: Cli, start: Start, model: str) -> None:
    with start("agent") as agent:
        wait_ready(agent)
        (row,) = node.json("prefetch", model)
        assert row["bytes_fetched"] == row["bytes_total"] == len(DATA) + 2
        status = ask(node, "GET", "/metrics")
        assert 'weightstream_agent_prefetches_total{outcome="done"} 1.0' in status
        assert "nothing-here" in node.error("prefetch", "s3://models/nothing-here", code=3)
        end(agent)
    assert node.json("prefetch", model)[0]["bytes_fetched"] == 0


def ask(node: Cli, method: str, path: str) -> str:
    from weightstream.cachefs.agent.asking import _UnixConnection

    connection = _UnixConnection(Path(node.env["WEIGHTSTREAM_RUN_DIRECTORY"]))
    try:
        connection.request(method, path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


@needs_mount
@pytest.mark.fuse
def test_sigterm_ends_it_while_its_mount_hangs(
    node: Cli, start: Start, hanging_endpoint: str, tmp_path: Path
) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    node.env |= {"AWS_ENDPOINT_URL": hanging_endpoint, "WEIGHTSTREAM_DEADLINE_S": "4"}
    with start("agent", "--mount", f"{URI}:{directory}") as agent:
        agent.wait_for(lambda: any((tmp_path / "run").glob("mnt-*.json")) or sockets(tmp_path))
        time.sleep(0.5)
        assert "is ready in" not in agent.stderr()
        end(agent)


def sockets(home: Path) -> bool:
    return (home / "run" / "agent-control.sock").is_socket()


@needs_mount
@pytest.mark.fuse
def test_mounts_outlive_it_and_read_through_it(
    node: Cli, start: Start, model: str, tmp_path: Path
) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    given = ("agent", "--mount", f"{model}:{directory}")
    try:
        with start(*given) as agent:
            wait_ready(agent)
            assert (directory / "model.safetensors").read_bytes() == DATA
            status = json.loads(ask(node, "GET", "/v1/status"))
            states = {mount["directory"]: mount["state"] for mount in status["mounts"]}
            assert states[str(directory)] == "ready"
            given_bytes = ask(node, "GET", "/metrics").split("weightstream_agent_bytes_total ")[-1]
            assert float(given_bytes.split()[0]) >= len(DATA)
            agent.process.kill()
        assert (directory / "config.json").read_bytes() == b"{}"
        with start(*given) as agent:  # finds its mount
            wait_ready(agent)
            assert json.loads(ask(node, "GET", "/readyz")) == {"ready": True}
            end(agent)
        assert (directory / "model.safetensors").read_bytes() == DATA
    finally:
        node("umount", directory)


def test_the_flags_in_words() -> None:
    assert _mount("s3://models/a:/mnt/a").directory == "/mnt/a"
    assert _address("[::1]:80") == ("::1", 80)
    for bad in ("s3://models", ":", "a:", ":/mnt"):
        with pytest.raises(UsageError):
            _mount(bad)
    for bad in ("80", "host:", "host:x", "host:99999"):
        with pytest.raises(UsageError):
            _address(bad)
