"""The machine: kernel, processors, memory, huge pages, open files."""

import os
import platform
import re
import resource
from pathlib import Path

from weightstream.cachefs.fetch.budget import budget_bytes, memory_bytes
from weightstream.cli.doctor.check import Check
from weightstream.settings import Settings, format_bytes

GROUP = "machine"
THP = Path("/sys/kernel/mm/transparent_hugepage")
PASSTHROUGH = (6, 9)  # the first Linux with FUSE passthrough
FEW_FILES = 1024
SMALL_BUDGET_BYTES = 256 << 20  # 32 ranges of 8 MiB: what one fast link keeps in flight


def checks(settings: Settings) -> list[Check]:
    """Return the rows about this machine."""
    return [
        kernel(platform.release()),
        processors(),
        memory(settings),
        huge_pages(),
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
    ]


def kernel(release: str) -> Check:
    """Report the kernel and whether it can pass file reads through a mount."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    if numbers >= PASSTHROUGH:
        return Check(GROUP, "kernel", "ok", f"Linux {release}")
    limits = "no FUSE passthrough (Linux 6.9): a mount reads at a third of the disk's cache speed"
    return Check(GROUP, "kernel", "warn", f"Linux {release}", limits, "boot a newer kernel")


def processors() -> Check:
    """Report how many processors this process may use."""
    usable = len(os.sched_getaffinity(0))
    return Check(GROUP, "processors", "ok", f"{usable} of {os.cpu_count()} usable")


def memory(settings: Settings) -> Check:
    """Report the memory limit and the budget made from it."""
    limit = memory_bytes()
    budget = budget_bytes(settings.memory_budget)
    found = f"{format_bytes(limit)} usable; budget {format_bytes(budget)}"
    if budget >= SMALL_BUDGET_BYTES:
        return Check(GROUP, "memory", "ok", found)
    limits = "fewer ranges in flight than a fast link wants, and write-back that skips chunks"
    remedy = "raise the container's memory limit, or set WEIGHTSTREAM_MEMORY_BUDGET=512MiB"
    return Check(GROUP, "memory", "warn", found, limits, remedy)


def huge_pages(root: Path = THP) -> Check:
    """Report whether large buffers get huge pages when they ask (madvise) for them."""
    try:
        text = (root / "enabled").read_text()
    except OSError as error:
        return _no_huge_pages(f"unknown ({error.strerror})")
    chosen = re.search(r"\[(\w+)\]", text)
    mode = chosen[1] if chosen else text.strip()
    if mode in ("always", "madvise"):
        return Check(GROUP, "huge pages", "ok", mode)
    return _no_huge_pages(mode)


def _no_huge_pages(mode: str) -> Check:
    limits = "cold loads cost about twice the CPU: 4 KiB page faults"
    remedy = f"echo madvise | sudo tee {THP}/enabled"
    return Check(GROUP, "huge pages", "warn", mode, limits, remedy)


def open_files(soft: int, hard: int) -> Check:
    """Report the limit of open files: a socket per range in flight, two files per blob."""
    unlimited = resource.RLIM_INFINITY
    found = f"{'unlimited' if soft == unlimited else soft} open files"
    if soft == unlimited or soft >= FEW_FILES:
        return Check(GROUP, "open files", "ok", found)
    limits = "models of many shards may run out of file descriptors"
    raised = hard if hard != unlimited else 65536
    return Check(GROUP, "open files", "warn", found, limits, f"ulimit -n {raised}")
