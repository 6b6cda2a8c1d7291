"""The command line as a user has it: a process of its own, with its own store and settings."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.kit.processes import Child, Outcome, clean_env, run_cli
from tests.kit.s3 import SECRET_KEY, S3Server


@dataclass(slots=True)
class Cli:
    """Runs commands; whatever they do, they print neither a traceback nor a secret."""

    env: dict[str, str]
    store: Path
    seen: list[Outcome] = field(default_factory=list)

    def __call__(self, *arguments: object, code: int = 0) -> Outcome:
        """Run a command and check its exit code."""
        outcome = run_cli(*arguments, env=self.env)
        check(outcome)
        assert outcome.returncode == code, f"{outcome.stdout}\n{outcome.stderr}"
        return outcome

    def json(self, *arguments: object, code: int = 0) -> Any:
        """Run a command with --json and return its one document."""
        return json.loads(self(*arguments, "--json", code=code).stdout)

    def error(self, *arguments: object, code: int) -> str:
        """Run a command that fails; return its one line."""
        outcome = self(*arguments, code=code)
        assert outcome.stdout == ""
        lines = outcome.stderr.strip().splitlines()
        assert len(lines) == 1, outcome.stderr
        assert lines[0].startswith("weightstream: ")
        return lines[0]


def check(outcome: Outcome) -> None:
    """Check what must hold of every run."""
    said = outcome.stdout + outcome.stderr
    assert "Traceback" not in said, said
    assert SECRET_KEY not in said, said


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Return a runner with nothing configured but a store in a new directory."""
    home = tmp_path / "home"
    home.mkdir()
    settings = {
        "HOME": str(home),
        "WEIGHTSTREAM_STORE": str(tmp_path / "store"),
        "WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0",
        "WEIGHTSTREAM_CHUNK_SIZE": "1MiB",
        "WEIGHTSTREAM_DEADLINE_S": "5",
        "WEIGHTSTREAM_STALL_TIMEOUT_S": "2",
    }
    return Cli(clean_env(settings), tmp_path / "store")


@pytest.fixture
def s3_cli(cli: Cli, s3: S3Server) -> Cli:
    """Return a runner that reaches the S3 server."""
    cli.env |= s3.env
    return cli


@pytest.fixture
def start(cli: Cli) -> Callable[..., Child]:
    """Start a command and return the process; to be used in a `with`."""

    def begin(*arguments: object) -> Child:
        command = [sys.executable, "-m", "weightstream.cli", *map(str, arguments)]
        return Child(command, cli.env)

    return begin


@pytest.fixture
def hanging_endpoint() -> Iterator[str]:
    """Listen, and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def wait_for_connection(pid: int) -> None:
    """Return when the process has an established TCP connection."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        sockets = _sockets(pid)
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        established = {f"socket:[{line.split()[9]}]" for line in lines if line.split()[3] == "01"}
        if sockets & established:
            return
        time.sleep(0.02)
    raise AssertionError("the process made no connection")


def _sockets(pid: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(os.readlink(link))
    return found
