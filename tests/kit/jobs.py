"""What tests have other processes do (see `tests.kit.forked`)."""

import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What a load brought."""

    digest: str
    bytes_by_source: dict[str, int]
    ready_s: float


def digest(tensors: "Mapping[str, torch.Tensor]") -> str:
    """Return one hash over names, dtypes, shapes and bits."""
    total = blake3()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(_bits(tensor))
    return total.hexdigest()


def _bits(tensor: "torch.Tensor") -> memoryview:
    """Return a tensor's bytes without a copy where it is contiguous, and without numpy."""
    import torch

    flat = tensor.contiguous().flatten().view(torch.uint8)
    if not flat.numel():
        return memoryview(b"")
    held = (ctypes.c_char * flat.numel()).from_address(flat.data_ptr())
    held.owner = flat  # type: ignore[attr-defined]  # lives as long as the view
    return memoryview(held).cast("B")


def load(uri: str) -> LoadOutcome:
    """Load a model with the settings of the environment."""
    from weightstream.loader.api import load_with_report

    began_s = time.monotonic()
    loaded = load_with_report(uri)
    ready_s = time.monotonic() - began_s
    return LoadOutcome(digest(loaded.tensors), dict(loaded.report.bytes_by_source), ready_s)


def stream(uri: str, order: str = "readiness") -> str:
    """Stream a model; return the digest of all of it."""
    from weightstream.loader.api import stream as stream_model

    assert order in ("readiness", "natural")
    return digest(dict(stream_model(uri, order="natural" if order == "natural" else "readiness")))
