"""What callers may pass, checked once at the door."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias, Union

from weightstream.errors import UsageError
from weightstream.loader.dtypes import require_torch

if TYPE_CHECKING:
    import torch

Device: TypeAlias = Union[str, int, "torch.device"]


def check_names(names: Iterable[str] | None) -> frozenset[str] | None:
    """Return the wanted names as a set; None wants all."""
    if names is None:
        return None
    if isinstance(names, str | bytes) or callable(names):
        raise UsageError("names: give an iterable of tensor names")
    found = frozenset(names)
    for name in found:
        if not isinstance(name, str):
            raise UsageError(f"names: {name!r} is not a tensor name")
    return found


def check_device(device: Device) -> "torch.device":
    """Return the device; UsageError for one that torch does not know or that holds no bytes."""
    require_torch()
    import torch

    try:
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device: {device!r}: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        raise UsageError("device: tensors on meta hold no bytes; nothing to load")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: {device!r}: torch {torch.__version__} finds no CUDA device")
    if found.type == "cuda" and found.index is None:  # threads have current devices of their own
        return torch.device("cuda", torch.cuda.current_device())
    return found


def check_dtype(dtype: "torch.dtype | str | None") -> "torch.dtype | None":
    """Return the dtype to cast floating tensors to."""
    if dtype is None:
        return None
    import torch

    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if isinstance(found, torch.dtype) and getattr(found, "is_floating_point", False):
        return found
    raise UsageError(f"dtype: {dtype!r} is not a floating dtype of torch")


def cast(tensor: "torch.Tensor", dtype: "torch.dtype | None") -> "torch.Tensor":
    """Return the tensor in `dtype` when it is a floating one, as `Module.to(dtype)` does."""
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    try:
        return tensor.to(dtype)
    except (RuntimeError, NotImplementedError) as error:
        cause = str(error).splitlines()[0]
        raise UsageError(f"dtype: cannot cast {tensor.dtype} to {dtype}: {cause}") from error
