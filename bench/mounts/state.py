"""What a weightstream mount says of itself, to the benchmark as to anybody."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightstream.bench.errors import BenchError
from weightstream.cachefs.fuse.mounts import RunDirectory
from weightstream.errors import MountError

_POLL_S = 0.05
_STATE = "user.weightstream.state"
_READS = 'weightstream_fuse_requests_total{op="read"}'
# What the kernel remembers is the kernel's to forget, and costs a few bytes a name.
_LASTING = frozenset({"nodes"})


class Status:
    """Counters of one mount's server."""

    def __init__(self, directory: Path, run_directory: Path) -> None:
        self._directory = str(directory)
        self._run = RunDirectory(run_directory)

    def reads(self) -> int:
        """Return how many READ requests the server has had."""
        found = self._ask("metrics")["metrics"]
        return int(found.get(_READS, 0))

    def gauges(self, patience_s: float) -> int:
        """Return the sum of what must be 0 when nobody uses the mount, once it is 0 or late."""
        deadline = time.monotonic() + patience_s
        while (found := self._held()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return found

    def _held(self) -> int:
        gauges = self._ask("status")["gauges"]
        return sum(value for name, value in gauges.items() if name not in _LASTING)

    def _ask(self, command: str) -> dict[str, Any]:
        try:
            return self._run.ask(self._directory, {"command": command})
        except (OSError, MountError) as error:
            raise BenchError(f"no {command} of {self._directory}: {error}") from error


def wait_until_complete(paths: Sequence[Path], patience_s: float) -> None:
    """Wait until every file is complete in the store."""
    deadline = time.monotonic() + patience_s
    for path in paths:
        while (state := os.getxattr(path, _STATE).decode()) != "complete":
            if time.monotonic() > deadline:
                raise BenchError(f"{path.name} is {state} after {patience_s:.0f} s")
            time.sleep(_POLL_S)
