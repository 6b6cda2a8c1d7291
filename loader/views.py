"""A torch tensor over memory that weightstream filled.

Each tensor keeps its own slice of the mapping alive, and gives the pages that lie wholly inside it
back when it dies: dropping one tensor of a model frees that tensor's memory, and never a byte of a
neighbour. Memory that is misaligned for the dtype is copied, because kernels may read it in words.
"""

import mmap
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch.memory import PAGE_BYTES, release_pages
from weightstream.errors import FormatError, UsageError
from weightstream.loader.dtypes import DType, torch_dtype
from weightstream.loader.header import TensorInfo, shown
from weightstream.loader.plan import Place

if TYPE_CHECKING:
    import torch


def tensor_over(memory: mmap.mmap, offset: int, blob: Blob, info: TensorInfo) -> "torch.Tensor":
    """Return the tensor whose bytes start at `offset` of `memory`."""
    import torch

    dtype, shape = torch_type(blob, info), torch_shape(blob, info)
    size = len(info.extent)
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    view = memoryview(memory)[offset : offset + size]
    if offset % max(1, info.dtype.bits // 8):  # complex too: c10 aligns it to its whole size
        return torch.frombuffer(view, dtype=torch.uint8).clone().view(dtype).reshape(shape)
    if size >= PAGE_BYTES:
        weakref.finalize(view, release_pages, memory, offset, offset + size).atexit = False
    return torch.frombuffer(view, dtype=dtype).reshape(shape)


def torch_type(blob: Blob, info: TensorInfo) -> "torch.dtype":
    """Return the tensor's dtype in torch; UsageError naming it where torch has none."""
    dtype = torch_dtype(info.dtype)
    if dtype is None:
        import torch

        raise UsageError(
            f"{blob.uri}: tensor {shown(info.name)} has dtype {info.dtype.name}, "
            f"for which torch {torch.__version__} has no type"
        )
    return dtype


def torch_shape(blob: Blob, info: TensorInfo) -> tuple[int, ...]:
    """Return the tensor's shape in torch, where one element may hold several of the format's."""
    per_element = info.dtype.per_element
    if per_element == 1:
        return info.shape
    if not info.shape or info.shape[-1] % per_element:
        raise FormatError(
            f"{blob.uri}: tensor {shown(info.name)}: torch packs {per_element} {info.dtype.name} "
            f"into one element, and the last dimension of {list(info.shape)} does not divide"
        )
    return (*info.shape[:-1], info.shape[-1] // per_element)


def check_types(places: Iterable[Place]) -> None:
    """Refuse what torch cannot hold before its bytes are waited for."""
    good: set[DType] = set()
    for place in places:
        if place.info.dtype not in good or place.info.dtype.per_element > 1:
            torch_type(place.blob, place.info)
            torch_shape(place.blob, place.info)
            good.add(place.info.dtype)
