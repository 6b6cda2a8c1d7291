"""The raw ceiling: curl processes that fetch ranges in parallel, into tmpfs files or /dev/null.

Options: `processes` (each a single thread), `connections` (per process), `sink` (memory or null).
"""

import subprocess
from pathlib import Path

from weightstream.bench.errors import BenchError
from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors

_RANGE_BYTES = 64 << 20


def _setup(job: Job) -> None:
    subprocess.run(["curl", "--version"], check=True, capture_output=True)


def _ranges(job: Job) -> list[tuple[str, int, int]]:
    """Return (url, first, last) of all ranges."""
    found = []
    for key, path in zip(job.keys, job.files, strict=True):
        size = Path(path).stat().st_size
        url = f"{job.endpoint}/{job.bucket}/{key}"
        found += [
            (url, start, min(size, start + _RANGE_BYTES) - 1)
            for start in range(0, size, _RANGE_BYTES)
        ]
    return found


def _config(job: Job, part: list[tuple[str, int, int]]) -> str:
    lines = ["silent", "show-error", "fail"]
    if job.ca_bundle:
        lines.append(f'cacert = "{job.ca_bundle}"')
    for url, first, last in part:
        name = f"{job.memory}/{url.rsplit('/', 1)[1]}.{first}"
        output = "/dev/null" if job.options.get("sink") == "null" else name
        lines += [f'url = "{url}"', f'range = "{first}-{last}"', f'output = "{output}"', "next"]
        lines += ["silent", "show-error", "fail"]
    return "\n".join(lines[:-4]) + "\n"


def _load(job: Job, first: First) -> Tensors | None:
    count = int(job.options.get("processes", "1"))
    connections = job.options.get("connections", "8")
    ranges = _ranges(job)
    command = ["curl", "--parallel", "--parallel-immediate", "--parallel-max", connections]
    running = []
    for number in range(count):
        config = Path(job.memory) / f"curl{number}.conf"
        config.write_text(_config(job, ranges[number::count]))
        running.append(
            subprocess.Popen([*command, "--config", str(config)], stderr=subprocess.PIPE)
        )
    for process in running:
        _, errors = process.communicate()
        if process.returncode != 0:
            raise BenchError(f"curl: exit {process.returncode}: {errors.decode()[-200:].strip()}")
    return None


PEER = Peer(_setup, _load, packages=())
