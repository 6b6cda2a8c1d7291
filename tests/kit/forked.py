"""Other processes in milliseconds: forked from a server that has imported the heavy things.

A fresh interpreter with torch takes two to six seconds on a busy machine; a child of the fork
server takes ten milliseconds, and is a process of its own all the same: engine, store, connections
and locks are made in it, and `kill -9` hits nobody else.
"""

import atexit
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "tests.kit.jobs"])


class ChildFailed(Exception):
    """The job raised; the message is `TypeName: text`."""


class Forked:
    """A job in a process of its own; a context manager that never leaves it behind.

    `job` must be importable by name (see `tests.kit.jobs`).
    """

    def __init__(
        self, job: Callable[..., Any], *arguments: object, env: Mapping[str, str] | None = None
    ) -> None:
        self._receiving, sending = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_run, args=(sending, job, arguments, dict(env or {})), daemon=True
        )
        self._process.start()
        sending.close()

    @property
    def alive(self) -> bool:
        """Say whether it still runs."""
        return self._process.is_alive()

    def result(self, timeout_s: float = 60.0) -> Any:
        """Return what the job returned; raise `ChildFailed` with what it raised."""
        if not self._receiving.poll(timeout_s):
            raise AssertionError(f"no result within {timeout_s} s")
        try:
            good, value = self._receiving.recv()
        except EOFError:
            self._process.join(10)
            raise ChildFailed(f"died with exit code {self._process.exitcode}") from None
        self._process.join(timeout_s)
        assert not self._process.is_alive(), f"no exit within {timeout_s} s of its result"
        if not good:
            raise ChildFailed(value)
        return value

    def kill(self) -> None:
        """Kill -9 and reap."""
        self._process.kill()
        self._process.join(10)

    def wait_for(self, happened: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait until something is so, or the process has ended."""
        deadline = time.monotonic() + timeout_s
        while not happened() and self.alive:
            assert time.monotonic() < deadline, "did not happen"
            time.sleep(0.001)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.is_alive():
            self.kill()
        self._process.close()
        self._receiving.close()


def _run(
    sending: Connection, job: Callable[..., Any], arguments: tuple[Any, ...], env: dict[str, str]
) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "WEIGHTSTREAM_")):
            del os.environ[name]
    os.environ.update(env)
    try:
        value = (True, job(*arguments))
    except Exception as error:
        value = (False, f"{type(error).__name__}: {error}")
    sending.send(value)
    sending.close()
    atexit._run_exitfuncs()  # multiprocessing's children skip them; a real process does not
