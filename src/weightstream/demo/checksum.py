"""One digest for a state dict: the proof that two ways of loading brought the same bytes.

Tensors are read through their address, so that a dtype that numpy lacks (bf16, fp8) costs nothing.
"""

import ctypes
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from blake3 import blake3

if TYPE_CHECKING:
    from torch import Tensor

Fingerprint = tuple[str, str, tuple[int, ...], int]
"""Name, dtype, shape and CRC64NVME of one tensor."""


def raw_bytes(tensor: "Tensor") -> memoryview:
    """Return the memory of a contiguous tensor; the caller keeps the tensor alive."""
    count = tensor.numel() * tensor.element_size()
    if count == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * count).from_address(tensor.data_ptr())).cast("B")


def fingerprint(name: str, tensor: "Tensor") -> Fingerprint:
    """Read every byte of a tensor (12 GB/s a core: memory is the limit)."""
    checksums: Any = import_module("awscrt.checksums")  # its stubs know bytes only

    kept = tensor.detach().cpu().contiguous()
    return name, str(tensor.dtype), tuple(tensor.shape), int(checksums.crc64nvme(raw_bytes(kept)))


def checksum_of(parts: Iterable[Fingerprint]) -> str:
    """Return one digest, whatever the order of the tensors."""
    digest = blake3()
    for name, dtype, shape, crc in sorted(parts):
        digest.update(f"{name}\0{dtype}\0{shape}\0{crc:016x}\n".encode())
    return digest.hexdigest(length=8)
