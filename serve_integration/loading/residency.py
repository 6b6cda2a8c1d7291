"""Whether mapped weights lie in the page cache, asked of the kernel before anybody touches them."""

import ctypes
import mmap
from collections.abc import Iterable

_SAMPLES = 64
"""Pages asked for per mapping, evenly spread: the answer is one word, and mincore costs 1 us."""
_MOSTLY = 0.9

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_ubyte))


def mostly_resident(memories: Iterable[mmap.mmap]) -> bool:
    """Say whether nine of ten pages are in memory; False for nothing at all."""
    found = [page for memory in memories for page in _sample(memory)]
    return bool(found) and sum(found) >= _MOSTLY * len(found)


def _sample(memory: mmap.mmap) -> list[bool]:
    pages = -(-len(memory) // mmap.PAGESIZE)
    step = max(1, pages // _SAMPLES)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return [_is_resident(address + page * mmap.PAGESIZE) for page in range(0, pages, step)]


def _is_resident(address: int) -> bool:
    state = ctypes.c_ubyte()
    answer = _libc.mincore(address, mmap.PAGESIZE, ctypes.byref(state))
    return answer == 0 and bool(state.value & 1)
