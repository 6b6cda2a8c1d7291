"""What a reader of the numbers must know about the machine and the software."""

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_ALWAYS = ("weightstream", "torch", "safetensors", "numpy", "awscrt", "botocore")


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that ran the benchmark."""

    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    disk: str  # file system of the stores and downloads

    def line(self) -> str:
        """Return one line."""
        memory = f"{self.memory_bytes / (1 << 30):.0f} GiB"
        system = f"Linux {self.kernel}, Python {self.python}"
        return f"{self.cpu}, {self.cores} cores, {memory}, {self.disk}, {system}"


def describe_machine(folder: Path) -> Machine:
    """Look at this machine; `folder` is on the disk that is used."""
    return Machine(
        cpu=_field("/proc/cpuinfo", "model name") or platform.processor() or "unknown CPU",
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=int((_field("/proc/meminfo", "MemTotal") or "0").split()[0]) * 1024,
        kernel=platform.release(),
        python=platform.python_version(),
        disk=_file_system(folder),
    )


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the distributions that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in sorted({*_ALWAYS, *packages}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _field(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _file_system(folder: Path) -> str:
    """Return the type of the file system that holds a folder: the longest mount point wins."""
    where = folder.resolve()
    best = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        if where.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]
