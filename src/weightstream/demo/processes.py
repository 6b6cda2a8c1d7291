"""Starts and ends child processes so that none outlives demo or bench, however they end."""

import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from weightstream.errors import WeightstreamError

_STOP_S = 5.0
# The kernel ends the child when this process dies, even by SIGKILL. A prefix and not `preexec_fn`,
# which is not safe in a process with threads.
_DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM", "--")


class ChildFailed(WeightstreamError):
    """A child process failed, said nothing in time, or could not be started."""


def start(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    stderr: Path,
    pipes: bool = False,
) -> "subprocess.Popen[bytes]":
    """Start a child in a session of its own; `pipes` connects its stdin and stdout to us."""
    pipe = subprocess.PIPE if pipes else subprocess.DEVNULL
    prefix = _DIE_WITH_PARENT if shutil.which(_DIE_WITH_PARENT[0]) else ()
    stderr.parent.mkdir(parents=True, exist_ok=True)
    with stderr.open("ab") as errors:
        return subprocess.Popen(
            [*prefix, *command],
            env=dict(env) if env is not None else None,
            stdin=pipe,
            stdout=pipe,
            stderr=errors,
            start_new_session=True,
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a child and everything that it started: SIGTERM, five seconds, SIGKILL."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait(_STOP_S)
    _signal_group(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def clean_environment(environment: Mapping[str, str], *more: str) -> dict[str, str]:
    """Return the environment without endpoints, credentials, proxies and settings of ours.

    `more` are further beginnings of names to leave out.
    """
    beginnings = ("AWS_", "WEIGHTSTREAM_", "RCLONE_", "FSSPEC_", *more)
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(beginnings) and not name.lower().endswith("_proxy")
    }


class Child:
    """A process that speaks in lines: lines in, lines out, everything under a deadline."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stderr: Path) -> None:
        self._stderr = stderr
        self._process = start(command, env=env, stderr=stderr, pipes=True)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, line: str) -> None:
        """Write a line to the child's stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, prefix: str, timeout_s: float) -> str:
        """Return the next line that begins with `prefix`; others (logs of peers) are skipped."""
        deadline = time.monotonic() + timeout_s
        while True:
            while b"\n" in self._buffer:
                line, self._buffer = self._buffer.split(b"\n", 1)
                if line.startswith(prefix.encode()):
                    return line.decode()
            self._buffer += self._read(deadline)

    def outcome(self, timeout_s: float) -> tuple[str, float]:
        """Return the child's JSON line, and how long it then took to end."""
        line = self.expect("{", timeout_s)
        printed_s = time.monotonic()
        self.wait(timeout_s)
        return line, time.monotonic() - printed_s

    def wait(self, timeout_s: float) -> None:
        """Wait for the end of the process, which must be a good one."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ChildFailed(f"did not end within {timeout_s:.0f} s of its result") from error
        if code != 0:
            raise ChildFailed(self._reason(code))

    def close(self) -> None:
        """End the process if it still runs."""
        stop(self._process)

    def _read(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        left_s = deadline - time.monotonic()
        poller = select.poll()  # not select(), which knows no descriptor above 1023
        poller.register(self._process.stdout, select.POLLIN | select.POLLHUP)
        if left_s <= 0 or not poller.poll(left_s * 1000):
            raise ChildFailed("timed out")
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        if not data:
            raise ChildFailed(self._reason(self._process.wait(_STOP_S)))
        return data

    def _reason(self, code: int) -> str:
        lines = self._stderr.read_text(errors="replace").strip().splitlines()
        return f"exit {code}: {lines[-1][:300] if lines else 'no message'}"
