"""Measures a process (CPU, memory), the touching of tensors, and the page cache.

Every peer is measured by these same functions.
"""

import ctypes
import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weightstream.demo.checksum import raw_bytes

if TYPE_CHECKING:
    from torch import Tensor

_PAGE_BYTES = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.mlock.argtypes = _libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def cpu_s() -> float:
    """Return user and system time of this process and of the children it has waited for."""
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in usage)


def peak_rss_bytes() -> int:
    """Return the most resident memory that this process ever had (VmHWM)."""
    return _status_bytes("VmHWM")


def rss_bytes() -> int:
    """Return the resident memory of this process (VmRSS)."""
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def touch_pages(tensors: Mapping[str, "Tensor"]) -> float:
    """Read one byte of every page of every tensor; return the seconds."""
    start = time.perf_counter()
    for tensor in tensors.values():
        data = np.frombuffer(raw_bytes(tensor.contiguous()), dtype=np.uint8)
        int(data[::_PAGE_BYTES].sum())
    return time.perf_counter() - start


def prepare_checksum() -> None:
    """Import what a checksum needs: after the load, so that it helps no peer's own imports."""
    import_module("awscrt.checksums")


def evict(paths: Iterable[Path]) -> None:
    """Drop the files from the page cache: write what is dirty, then POSIX_FADV_DONTNEED."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def warm(paths: Iterable[Path]) -> None:
    """Read the files, so that they are in the page cache."""
    buffer = bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@contextmanager
def kept_in_memory(paths: Iterable[Path]) -> Iterator[None]:
    """Read the files into the page cache and lock them there, as far as the user may.

    A kernel that reclaims cold pages early (DAMON) would else take a served file away between two
    samples, and the server's disk would be measured.
    """
    with ExitStack() as held:
        for path in paths:
            warm([path])
            if size := path.stat().st_size:
                # Read-only and shared: locking a private writable mapping would lock copies.
                with path.open("rb") as file:
                    mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
                view = np.frombuffer(mapping, np.uint8)
                _libc.mlock(view.ctypes.data, size)  # fails without privilege: warm all the same
                held.callback(_unlock, view)
        yield


def _unlock(view: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> None:
    _libc.munlock(view.ctypes.data, view.size)


def back_free_memory(count: int) -> None:
    """Touch `count` bytes in a child and free them, so that they are free but not given back.

    A virtual machine that reports free pages to its host gets them back by a fault in the host for
    every 4 KiB: 1.6 s/GB here, several times what any loader costs, and it strikes whoever touches
    memory that lay free for two seconds. It is the machine's cost and not a loader's.
    """
    if count:
        subprocess.run([sys.executable, "-S", "-c", _TOUCH_AND_FREE, str(count)], check=True)


_TOUCH_AND_FREE = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for start in range(0, len(memory), mmap.PAGESIZE):
    memory[start] = 1
"""


def residency(paths: Iterable[Path]) -> float:
    """Return the part of the files' pages that is in the page cache, by mincore()."""
    pages = resident = 0
    for path in paths:
        total, cached = _mincore(path)
        pages += total
        resident += cached
    return resident / pages if pages else 0.0


def _mincore(path: Path) -> tuple[int, int]:
    size = path.stat().st_size
    if size == 0:
        return 0, 0
    total = -(-size // _PAGE_BYTES)
    vector = (ctypes.c_ubyte * total)()
    # A private writable mapping only because ctypes wants a writable buffer to take its address.
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        anchor = ctypes.c_char.from_buffer(mapping)
        result = _libc.mincore(ctypes.addressof(anchor), size, vector)
        code = ctypes.get_errno()
        del anchor
    finally:
        mapping.close()
    if result != 0:
        raise OSError(code, f"mincore: {os.strerror(code)}", str(path))
    return total, int((np.frombuffer(memoryview(vector), dtype=np.uint8) & 1).sum())


def files_under(folder: Path) -> list[Path]:
    """Return all regular files below a folder, but those that are just being written anew."""
    found = (path for path in folder.rglob("*") if path.suffix != ".tmp")
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def allocated_bytes(folder: Path) -> int:
    """Return what the files below a folder take on disk."""
    return sum(path.stat().st_blocks * 512 for path in files_under(folder))
