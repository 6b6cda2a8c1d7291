"""Python snippets in fresh processes: results as JSON, peak memory, time limits, kill -9.

A snippet calls `emit(value)` to say things; each becomes one JSON line on stdout, with the peak
resident memory so far (VmHWM: unlike ru_maxrss it does not remember the parent from before exec),
and without the pages of files that are mapped now: torch's libraries are 80 or 140 MiB of those, by
how the page cache got hold of them, and a freshly installed one has more.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any, Self

import weightstream

SOURCE = Path(weightstream.__file__).resolve().parents[1]
ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import json, sys
def emit(value=None):
    status = open("/proc/self/status").read()
    peak, files = (int(status.split(key)[1].split()[0]) << 10 for key in ("VmHWM:", "RssFile:"))
    said = {"value": value, "peak_rss_bytes": peak, "peak_own_bytes": peak - files}
    sys.stdout.write(json.dumps(said) + "\\n")
    sys.stdout.flush()
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process ended and what it said."""

    returncode: int
    values: tuple[Any, ...]
    stdout: str
    stderr: str
    peak_rss_bytes: int
    peak_own_bytes: int
    wall_s: float

    @property
    def value(self) -> Any:
        """Return the last emitted value; fail with the process's stderr when it failed."""
        assert self.returncode == 0, f"exit {self.returncode}\n{self.stdout}\n{self.stderr}"
        assert self.values, f"nothing emitted\n{self.stderr}"
        return self.values[-1]


class Child:
    """A running process; a context manager that never leaves it behind."""

    def __init__(
        self,
        command: list[str],
        env: Mapping[str, str] | None = None,
        preexec: Callable[[], None] | None = None,
    ) -> None:
        self._out: IO[bytes] = TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._err: IO[bytes] = TemporaryFile()  # noqa: SIM115
        self._started_s = time.monotonic()
        self.process = subprocess.Popen(
            command,
            env=clean_env(env),
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            preexec_fn=preexec,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self.process.pid

    def values(self) -> tuple[Any, ...]:
        """Return what it has emitted so far."""
        return tuple(record["value"] for record in self._records())

    def stderr(self) -> str:
        """Return what it has written to stderr so far. The file is never sought: the process has
        the same offset, and would write over what it wrote."""
        return _text(self._err)

    def wait_for(
        self, happened: Callable[[], bool], timeout_s: float = 30.0, poll_s: float = 0.002
    ) -> None:
        """Wait until something is so; fail when the process ends first or time is up."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            ended = self.process.poll() is not None
            if (ended and not happened()) or time.monotonic() > deadline:
                raise AssertionError(f"did not happen: {self.result(1.0)}")
            time.sleep(poll_s)

    def kill(self) -> None:
        """Kill -9, its children included, and reap."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(timeout=10)

    def result(self, timeout_s: float = 60.0) -> Outcome:
        """Wait for the end; kill it and fail when time is up."""
        try:
            code = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler prints its stacks
            time.sleep(0.3)
            self.kill()
            raise AssertionError(f"no end within {timeout_s} s\n{_text(self._err)}") from None
        records = self._records()
        peak = max((record["peak_rss_bytes"] for record in records), default=0)
        own = max((record["peak_own_bytes"] for record in records), default=0)
        values = tuple(record["value"] for record in records)
        wall_s = time.monotonic() - self._started_s
        return Outcome(code, values, _text(self._out), _text(self._err), peak, own, wall_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.kill()
        self._out.close()
        self._err.close()

    def _records(self) -> list[dict[str, Any]]:
        lines = _text(self._out).splitlines()
        return [
            json.loads(line) for line in lines if line.startswith('{"value":') and line[-1] == "}"
        ]


def clean_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment without this one's credentials, proxies and settings, plus `extra`."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    path = os.pathsep.join([str(SOURCE), str(ROOT)])
    return (
        kept
        | {"PYTHONPATH": path, "PYTHONFAULTHANDLER": "1", "LANG": "C.UTF-8"}
        | dict(extra or {})
    )


def start_python(
    code: str,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> Child:
    """Start a snippet; its arguments are in `sys.argv[1:]`. `prefix`: `ip netns exec NAME`."""
    command = [*prefix, sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    return Child(command, env)


def run_python(
    code: str,
    *arguments: object,
    env: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
    timeout_s: float = 60.0,
) -> Outcome:
    """Run a snippet to its end."""
    with start_python(code, *arguments, env=env, prefix=prefix) as child:
        return child.result(timeout_s)


def run_cli(
    *arguments: object, env: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> Outcome:
    """Run the `weightstream` command."""
    command = [sys.executable, "-m", "weightstream.cli", *map(str, arguments)]
    with Child(command, env) as child:
        return child.result(timeout_s)


def _text(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")
