"""What a load through the node's agent costs beside a load without: CPU seconds a GB.

`python -m weightstream.bench.agent [--repeat N]`: 1 GiB over the loopback device, each load in a
fresh process with a fresh store: alone, through an agent that has just started, and through one
that has loaded another model since. The agent's CPU seconds count, and with write-back those of
what is written behind the load. What starts and ends a process does not: imports, half a second of
taking torch apart, which would make every ratio smaller, and an agent's start, in which it makes a
client of the origin and faults 128 MiB in.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightstream.bench.cluster.model import write_model
from weightstream.bench.cluster.run import Place, environment, place
from weightstream.bench.errors import BenchError
from weightstream.bench.runners.base import preload
from weightstream.bench.servers import Server, nginx
from weightstream.cachefs.fetch import process_engine
from weightstream.loader.api import load_with_report
from weightstream.settings import load_settings

_SIZE_BYTES, _OTHER_BYTES = 1 << 30, 256 << 20
_ROOT, _URI, _OTHER_URI = "s3://models", "s3://models/model.safetensors", "s3://models/other/"
_READY_S, _LOAD_S, _WRITTEN_S = 30.0, 120.0, 60.0
_WAYS = (
    "alone",
    "through an agent that has just started",
    "through an agent that has loaded before",
)
_ALONE, _, _BEFORE = _WAYS
_CELLS = tuple((way, write_back) for write_back in ("off", "on") for way in _WAYS)
"""How the model is loaded, and whether with write-back; in turn."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load."""

    seconds: float
    cpu_s: float
    """The loader's and the agent's, until all is loaded and written."""


def load(place: Place, server: Server, way: str, write_back: str) -> Loaded:
    """Load once in one of the ways."""
    with tempfile.TemporaryDirectory(dir=place.work) as folder, ExitStack() as stack:
        env = environment(server) | {
            "WEIGHTSTREAM_STORE": f"{folder}/store",
            "WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0",
            "WEIGHTSTREAM_RUN_DIRECTORY": f"{folder}/run",
            "WEIGHTSTREAM_WRITE_BACK": write_back,
            "WEIGHTSTREAM_AGENT": "off" if way == _ALONE else "auto",
        }
        agent = None
        if way != _ALONE:
            agent = _start_agent(env, Path(folder))
            stack.callback(_end, agent)
        if way == _BEFORE:
            _load_in_child(env, _OTHER_URI, agent)
        said = _load_in_child(env, _URI, agent)
        return Loaded(said["seconds"], said["cpu_s"])


def _start_agent(env: dict[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "weightstream.cli", "agent", "--allow", _ROOT]
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


def _load_in_child(
    env: dict[str, str], uri: str, agent: "subprocess.Popen[bytes] | None"
) -> dict[str, Any]:
    """Load all of it from one source, in a fresh process; return what that said."""
    command = [sys.executable, "-m", "weightstream.bench.agent", "--load", uri]
    command += ["--agent", str(agent.pid)] if agent is not None else []
    source = "origin" if agent is None else "agent"
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_LOAD_S)
    if child.returncode:
        raise BenchError(f"the load ended with {child.returncode}: {child.stderr.strip()}")
    said: dict[str, Any] = json.loads(child.stdout)
    if set(said["sources"]) != {source}:
        raise BenchError(f"the bytes came from {said['sources']}, not from {source}")
    return said


def _load_here(uri: str, agent_pid: int | None) -> None:
    """Load, and say how it went: the child's part."""
    preload("torch", "s3fs", "weightstream.cachefs.origin.s3")
    before_s, began_s = _cpu_s(agent_pid), time.monotonic()
    loaded = load_with_report(uri)
    seconds = time.monotonic() - began_s
    if not process_engine(load_settings()).write_back.drain(_WRITTEN_S):
        raise BenchError(f"{uri} is not written yet")
    cpu_s = _cpu_s(agent_pid) - before_s
    sources = dict(loaded.report.bytes_by_source)
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "sources": sources}), flush=True)


def _cpu_s(agent_pid: int | None) -> float:
    """Return what this process and the agent have used. The agent goes on starting when it is
    ready, while this process imports: so both are asked at the same moments."""
    if agent_pid is None:
        return time.process_time()
    fields = Path(f"/proc/{agent_pid}/stat").read_text().rpartition(") ")[2].split()
    used_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return time.process_time() + used_s


def main() -> None:
    """Load with and without an agent in turn, and print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--agent", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        _load_here(given.load, given.agent)
        return
    with ExitStack() as stack:
        where = stack.enter_context(place(_SIZE_BYTES, "/dev/shm"))
        other = where.root / "models" / "other"
        other.mkdir()
        write_model(other / "model.safetensors", _OTHER_BYTES)
        server = stack.enter_context(
            nginx(where.root, "models", where.work / "nginx", where.certificates)
        )
        found = [{cell: load(where, server, *cell) for cell in _CELLS} for _ in range(given.repeat)]
    for write_back in ("off", "on"):
        print(f"write-back {write_back}:")
        alone = [run[_ALONE, write_back] for run in found]
        for way in _WAYS:
            loads = [run[way, write_back] for run in found]
            ratios = sorted(b.cpu_s / a.cpu_s for a, b in zip(alone, loads, strict=True))
            print(
                f"  {way}: {_medians(loads)}; {statistics.median(ratios):.2f} times the CPU "
                f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
            )


def _medians(loads: list[Loaded]) -> str:
    cpu_s = statistics.median(one.cpu_s for one in loads) / (_SIZE_BYTES / 1e9)
    return f"{cpu_s:.2f} CPU s/GB, {statistics.median(one.seconds for one in loads):.2f} s"


if __name__ == "__main__":
    main()
