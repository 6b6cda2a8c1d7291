"""The file that everybody loads: one safetensors model of random bytes."""

import json
import os
from pathlib import Path

from blake3 import blake3

_STEP_BYTES = 1 << 20
_TENSORS = 64


def write_model(path: Path, size_bytes: int) -> tuple[str, str]:
    """Write a model of exactly `size_bytes`; return the BLAKE3 of the file and of its tensors."""
    head = _head(size_bytes)
    whole, data = blake3(head), blake3()
    with path.open("wb") as file:
        file.write(head)
        left = size_bytes - len(head)
        while left:
            block = os.urandom(min(_STEP_BYTES, left))
            for hasher in (whole, data):
                hasher.update(block)
            file.write(block)
            left -= len(block)
    return whole.hexdigest(), data.hexdigest()


def _head(size_bytes: int) -> bytes:
    room = 16 << 10
    each, start, tensors = (size_bytes - room) // _TENSORS, 0, {}
    for i in range(_TENSORS):
        stop = start + each if i + 1 < _TENSORS else size_bytes - room
        tensors[f"t{i:03}"] = {
            "dtype": "U8",
            "shape": [stop - start],
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(tensors).encode().ljust(room - 8)
    return len(text).to_bytes(8, "little") + text
