"""One number bounds what weightstream holds in memory beside the caller's own tensors.

In-flight ranges without a home of their own, staging slabs and queued write-backs are all charged
to it. Nothing waits for it while holding a lock; who gets no memory tries again or does without.
"""

import os
import threading
from pathlib import Path

_CEILING_BYTES = 4 << 30
_SHARE = 8
_FLOOR_BYTES = 64 << 20


class MemoryBudget:
    """A counter with a limit; thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._used_bytes = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        """Return what is charged now."""
        return self._used_bytes

    def try_acquire(self, count: int) -> bool:
        """Charge `count` bytes, or return False. An idle budget grants any single request."""
        with self._lock:
            if self._used_bytes and self._used_bytes + count > self.limit_bytes:
                return False
            self._used_bytes += count
            return True

    def release(self, count: int) -> None:
        """Take a charge back."""
        with self._lock:
            self._used_bytes -= count


def budget_bytes(configured: int) -> int:
    """Return the limit in force: the configured one, or min(4 GiB, 1/8 of the memory)."""
    if configured:
        return configured
    return max(_FLOOR_BYTES, min(_CEILING_BYTES, memory_bytes() // _SHARE))


def memory_bytes() -> int:
    """Return the memory this process may use: the machine's, or its cgroup's limit if lower."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_cgroup_limits()])


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    limits = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (
            (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        )
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            text = _read(folder / name).strip()
            if text.isdigit():
                limits.append(int(text))
            if folder == base:
                break
    return limits


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
