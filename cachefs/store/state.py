"""The states of a chunk.

          write()            sync()
EMPTY ────────────> FILLED ──────────> DURABLE
  ^                   │ reboot            │
  │                   v                   │ the sealed data file was touched
  ├── wrong hash ── SUSPECT <─────────────┘
  │                   │ right hash
  │                   └──────> FILLED
  └── wrong hash, drop(): from any state
"""

from collections.abc import Iterator
from enum import IntEnum


class ChunkState(IntEnum):
    """What the store knows of one chunk."""

    EMPTY = 0
    FILLED = 1
    """Written and hashed on this boot; a power loss may take it."""
    DURABLE = 2
    """On the disk; no crash takes it."""
    SUSPECT = 3
    """Was there before something happened to the machine or the file: verify before use."""


# Bytes other than the four states can only come from a damaged table: verify those chunks too.
_IS_PRESENT = bytes(int(s in (ChunkState.FILLED, ChunkState.DURABLE)) for s in range(256))
_TO_SUSPECT = bytes(ChunkState.SUSPECT if s else 0 for s in range(256))


def count_present(states: bytes) -> int:
    """Count the chunks that may be read."""
    return states.count(ChunkState.FILLED) + states.count(ChunkState.DURABLE)


def present_bytes(states: bytes, chunk_size: int, size: int) -> int:
    """Return how many bytes of a blob of `size` may be read."""
    total = count_present(states) * chunk_size
    if count_present(states[-1:]):
        total -= len(states) * chunk_size - size  # the last chunk ends with the blob
    return total


def present_flags(states: bytes) -> bytes:
    """Return a byte per chunk: 1 where it may be read."""
    return states.translate(_IS_PRESENT)


def indices(states: bytes, wanted: int) -> Iterator[int]:
    """Yield the chunks in state `wanted`; costs as much as there are, not as the blob has."""
    at = states.find(wanted)
    while at >= 0:
        yield at
        at = states.find(wanted, at + 1)


def suspected(states: bytes) -> bytes:
    """Return the states after all that was there became SUSPECT."""
    return states.translate(_TO_SUSPECT)
