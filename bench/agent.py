"""What a load through the node's agent costs beside a load without: CPU seconds a GB.

`python -m weightstream.bench.agent [--repeat N]`: 1 GiB over the loopback device, each load in a
fresh process, with a fresh store and a fresh agent. The agent's CPU seconds count, those of imports
do not. With write-back what is written behind the load counts as well.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightstream.bench.cluster.run import Place, environment, place
from weightstream.bench.errors import BenchError
from weightstream.bench.runners.base import preload
from weightstream.bench.servers import Server, nginx
from weightstream.loader.api import load_with_report

_SIZE_BYTES = 1 << 30
_URI = "s3://models/"
_READY_S, _LOAD_S = 30.0, 120.0
_CELLS = ((False, "off"), (True, "off"), (False, "on"), (True, "on"))
"""Through an agent, and with write-back; in turn."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load."""

    seconds: float
    cpu_s: float
    """The loader's, from the load's beginning to its process's end, and the agent's."""
    sources: dict[str, int]


def load(place: Place, server: Server, through: bool, write_back: str) -> Loaded:
    """Load once, through an agent or without."""
    with tempfile.TemporaryDirectory(dir=place.work) as folder, ExitStack() as stack:
        env = environment(server) | {
            "WEIGHTSTREAM_STORE": f"{folder}/store",
            "WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0",
            "WEIGHTSTREAM_RUN_DIRECTORY": f"{folder}/run",
            "WEIGHTSTREAM_WRITE_BACK": write_back,
            "WEIGHTSTREAM_AGENT": "auto" if through else "off",
        }
        agent = _start_agent(env, Path(folder)) if through else None
        if agent is not None:
            stack.callback(_end, agent)
        before_s = _cpu_s(agent)
        said, loader_s = _load_in_child(env)
        found = Loaded(said["seconds"], loader_s + _cpu_s(agent) - before_s, said["sources"])
        if ("agent" in found.sources) != through:
            raise BenchError(f"the bytes came from {found.sources}")
        return found


def _start_agent(env: dict[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "weightstream.cli", "agent"]
    log = folder / "agent.log"
    with log.open("wb") as file:
        agent = subprocess.Popen(command, env=env, stderr=file)
    until_s = time.monotonic() + _READY_S
    while b"is ready in" not in log.read_bytes():
        if agent.poll() is not None or time.monotonic() > until_s:
            agent.kill()
            raise BenchError(f"the agent did not start: {log.read_text()}")
        time.sleep(0.1)
    return agent


def _end(agent: "subprocess.Popen[bytes]") -> None:
    agent.terminate()
    agent.wait(20)


def _load_in_child(env: dict[str, str]) -> tuple[dict[str, Any], float]:
    """Return what the child said, and its CPU seconds since the load began."""
    command = [sys.executable, "-m", "weightstream.bench.agent", "--load", _URI]
    before_s = _children_s()
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_LOAD_S)
    if child.returncode:
        raise BenchError(f"the load ended with {child.returncode}: {child.stderr.strip()}")
    said: dict[str, Any] = json.loads(child.stdout)
    return said, _children_s() - before_s - said["before_s"]


def _load_here(uri: str) -> None:
    """Load, and say how it went: the child's part."""
    preload("torch", "s3fs", "weightstream.cachefs.origin.s3")
    before_s, began_s = time.process_time(), time.monotonic()
    loaded = load_with_report(uri)
    seconds = time.monotonic() - began_s
    sources = dict(loaded.report.bytes_by_source)
    print(json.dumps({"seconds": seconds, "before_s": before_s, "sources": sources}), flush=True)


def _children_s() -> float:
    """Return the CPU seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _cpu_s(process: "subprocess.Popen[bytes] | None") -> float:
    if process is None:
        return 0.0
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Load with and without an agent in turn, and print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        _load_here(given.load)
        return
    with ExitStack() as stack:
        where = stack.enter_context(place(_SIZE_BYTES, "/dev/shm"))
        server = stack.enter_context(
            nginx(where.root, "models", where.work / "nginx", where.certificates)
        )
        found = [{cell: load(where, server, *cell) for cell in _CELLS} for _ in range(given.repeat)]
    for write_back in ("off", "on"):
        alone, agent = ([run[through, write_back] for run in found] for through in (False, True))
        ratios = sorted(b.cpu_s / a.cpu_s for a, b in zip(alone, agent, strict=True))
        print(
            f"write-back {write_back}: alone {_medians(alone)}; through an agent {_medians(agent)}"
        )
        print(f"  {statistics.median(ratios):.2f} times the CPU ({ratios[0]:.2f}-{ratios[-1]:.2f})")


def _medians(loads: list[Loaded]) -> str:
    cpu_s = statistics.median(one.cpu_s for one in loads) / (_SIZE_BYTES / 1e9)
    return f"{cpu_s:.2f} CPU s/GB, {statistics.median(one.seconds for one in loads):.2f} s"


if __name__ == "__main__":
    main()
