"""A mount as long as a block runs: started, waited for, unmounted, and gone whatever happens."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightstream.bench.errors import BenchError
from weightstream.bench.mounts import family
from weightstream.bench.mounts.peers import Launch
from weightstream.bench.mounts.private import file_system_at, take_away
from weightstream.demo.processes import start, stop

_MOUNTED_S = 30.0
_UNMOUNT_S = 10.0


@dataclass(frozen=True, slots=True)
class Mount:
    """A mounted bucket and its server."""

    directory: Path
    pid: int  # of the process that was started; it may have children

    def pids(self) -> tuple[int, ...]:
        """Return its processes."""
        return family.family(self.pid)


@contextmanager
def mounted(
    launch: Launch, directory: Path, env: Mapping[str, str], log: Path, prefix: Sequence[str] = ()
) -> Iterator[Mount]:
    """Mount; `prefix` starts the server in another network (`nsenter --net=...`)."""
    directory.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    environment = {**env, **launch.env}
    process = start([*prefix, *launch.command], env=environment, stderr=log)
    try:
        _wait_until_mounted(process, directory, log)
        yield Mount(directory, process.pid)
    finally:
        _unmount(launch, environment, process)
        stop(process)
        take_away(directory)
        os.rmdir(directory)


def _wait_until_mounted(process: "subprocess.Popen[bytes]", directory: Path, log: Path) -> None:
    """Wait for the mount, then ask it for its root: a server may mount before it answers."""
    deadline = time.monotonic() + _MOUNTED_S
    while not file_system_at(directory).startswith("fuse"):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise BenchError(f"not mounted: {lines[-1][-300:] if lines else 'no message'}")
        time.sleep(0.01)
    try:
        subprocess.run(["ls", str(directory)], capture_output=True, timeout=_MOUNTED_S, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise BenchError(f"mounted, but: {error}") from error


def _unmount(launch: Launch, env: Mapping[str, str], process: "subprocess.Popen[bytes]") -> None:
    """Ask for the end, and wait for it a while; `stop` and `take_away` see to the rest."""
    if launch.unmount and process.poll() is None:
        try:
            subprocess.run(launch.unmount, env=dict(env), capture_output=True, timeout=_UNMOUNT_S)
            process.wait(_UNMOUNT_S)
        except subprocess.TimeoutExpired:
            return
