"""What a mount's processes use: CPU time and memory of a process and all that it started."""

import os
from pathlib import Path

_TICKS_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def family(root: int) -> tuple[int, ...]:
    """Return a process, its descendants, and whoever is in its session."""
    status = {pid: fields for pid in _pids() if (fields := _stat(pid))}
    found = {root} & status.keys()
    while more := {
        pid
        for pid, (parent, session, _) in status.items()
        if pid not in found and (parent in found or session == root)
    }:
        found |= more
    return tuple(sorted(found))


def cpu_s(pids: tuple[int, ...]) -> float:
    """Return user and system time of processes, with that of children they have waited for."""
    return sum(fields[2] for pid in pids if (fields := _stat(pid)))


def peak_rss_bytes(pids: tuple[int, ...]) -> int:
    """Return the sum of the most resident memory that each process ever had (VmHWM)."""
    return sum(_peak(pid) for pid in pids)


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def _stat(pid: int) -> tuple[int, int, float] | None:
    """Return parent, session and CPU seconds; None for a process that is no more."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks
    return int(fields[1]), int(fields[3]), sum(map(int, fields[11:15])) / _TICKS_S


def _peak(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)
