"""A module without memory, and the weights that become its own.

The module is built on meta: no memory, no random numbers. What no file has are buffers that its
constructor computes (rotary frequencies, masks). Where there are any, or where a constructor wants
values of tensors, it is built with only the parameters on meta.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from weightstream.errors import UsageError
from weightstream.loader.into import assign

if TYPE_CHECKING:
    import torch

ModuleT = TypeVar("ModuleT", bound="torch.nn.Module")

_LONGEST = 1000
"""Characters of torch's complaint about keys that are repeated: a wrong model names hundreds."""


def build_on_meta(build: Callable[[], ModuleT], *, strict: bool) -> ModuleT:
    """Return the module: parameters on meta, buffers that the file need not have computed."""
    import torch

    try:
        with torch.device("meta"):
            module = build()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        return _build_buffers(build)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"build: returned {type(module).__name__}, which is no torch.nn.Module")
    return _build_buffers(build) if _computes_buffers(module, strict) else module


def give_weights(
    module: "torch.nn.Module",
    tensors: "dict[str, torch.Tensor]",
    uri: str,
    device: "torch.device",
    *,
    strict: bool,
) -> None:
    """Make the tensors the module's own, in eval mode; UsageError names what does not fit."""
    try:
        assign(module, tensors, strict)
    except RuntimeError as error:
        raise UsageError(f"{uri}: {_shortened(' '.join(str(error).split()))}") from error
    for one in module.modules():
        for name, buffer in one._buffers.items():
            if buffer is not None and not buffer.is_meta:
                one._buffers[name] = buffer.to(device)
    _refuse_meta(module, uri)
    module.eval().requires_grad_(False)


def _computes_buffers(module: "torch.nn.Module", strict: bool) -> bool:
    return any(
        one._non_persistent_buffers_set or (one._buffers and not strict) for one in module.modules()
    )


def _refuse_meta(module: "torch.nn.Module", uri: str) -> None:
    """With `strict=False` something may be left that neither the file nor the constructor gave."""
    both = (*module.named_parameters(), *module.named_buffers())
    left = [name for name, tensor in both if tensor.is_meta]
    if left:
        what = f"{type(module).__name__} has {len(left)} tensors that are not in it"
        raise UsageError(f"{uri}: {what}: {_shortened(', '.join(left))}")


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _build_buffers(build: Callable[[], ModuleT]) -> ModuleT:
    with _parameters_on_meta():
        return build()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put each parameter on meta as this thread registers it: its pages are hardly touched.

    torch's hook is one for all threads; the modules that others build are left as they are.
    """
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    mine = threading.get_ident()

    def to_meta(
        _module: torch.nn.Module, _name: str, parameter: "torch.nn.Parameter | None"
    ) -> "torch.nn.Parameter | None":
        if parameter is None or parameter.is_meta or threading.get_ident() != mine:
            return None
        return torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(cast(Any, to_meta))  # torch says: None
    try:
        yield
    finally:
        handle.remove()
