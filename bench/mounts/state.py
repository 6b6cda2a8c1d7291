"""What a weightstream mount says of itself, to the benchmark as to anybody."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from weightstream.bench.errors import BenchError
from weightstream.cachefs.fuse.mounts import RunDirectory
from weightstream.errors import MountError

_POLL_S = 0.05
_STATE = "user.weightstream.state"


class Status:
    """Counters of one mount's server."""

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self._run = RunDirectory(_run_directory())

    def reads(self) -> int | None:
        """Return how many READ requests the server has had; None where it does not count."""
        found = self._ask().get("reads")
        return int(found) if isinstance(found, int) else None

    def gauges(self, patience_s: float) -> int | None:
        """Return the sum of what must be 0 when nobody uses the mount, once it is 0 or late."""
        deadline = time.monotonic() + patience_s
        while (found := self._held()) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return found

    def _held(self) -> int | None:
        gauges = self._ask().get("gauges")
        return sum(gauges.values()) if isinstance(gauges, dict) else None

    def _ask(self) -> dict[str, object]:
        try:
            return self._run.ask(self._directory, {"command": "status"})
        except (OSError, MountError) as error:
            raise BenchError(f"no status of {self._directory}: {error}") from error


def wait_until_complete(paths: Sequence[Path], patience_s: float) -> None:
    """Wait until every file is complete in the store."""
    deadline = time.monotonic() + patience_s
    for path in paths:
        while (state := os.getxattr(path, _STATE).decode()) != "complete":
            if time.monotonic() > deadline:
                raise BenchError(f"{path.name} is {state} after {patience_s:.0f} s")
            time.sleep(_POLL_S)


def _run_directory() -> Path:
    if os.geteuid() == 0:
        return Path("/run/weightstream")
    return Path(os.environ.get("XDG_RUNTIME_DIR", "/tmp")) / "weightstream"
