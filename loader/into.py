"""`load_into`: a state dict into an `nn.Module`, without holding the model twice.

A module on meta takes the loaded tensors as they are. A module with memory is copied into batch by
batch while the stream goes on, after its keys were compared with the headers, before a byte moved.
Modules that rewrite state dicts on the way in (hooks, own `_load_from_state_dict`) get all at once.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from weightstream.loader.plan import Plan
from weightstream.loader.report import Stopwatch
from weightstream.loader.session import Session
from weightstream.loader.streamed import Request, TensorStream
from weightstream.loader.whole import load_whole

if TYPE_CHECKING:
    import torch

_BATCH_BYTES = 64 << 20
"""Handed to `load_state_dict` at once: it walks the whole module each time."""


class IncompatibleKeys(NamedTuple):
    """What `Module.load_state_dict` returns."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_module(
    session: Session,
    module: "torch.nn.Module",
    strict: bool,
    device: "torch.device | None",
    dtype: "torch.dtype | None",
    watch: Stopwatch,
) -> IncompatibleKeys:
    """Load the session's model into `module`."""
    import torch

    state = dict(module.state_dict(keep_vars=True))
    tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    on_meta = any(tensor.is_meta for tensor in tensors.values())
    if on_meta or len(tensors) != len(state) or _rewrites(module):
        request = Request(device or torch.device("cpu"), dtype, bounded=False)
        loaded = load_whole(session, request, watch).tensors
        return _load_all(module, loaded, tensors, strict, assign=on_meta)
    device = device or _only_device(tensors.values())
    return _load_streamed(session, module, tensors, strict, Request(device, dtype), watch)


def _rewrites(module: "torch.nn.Module") -> bool:
    from torch.nn import Module

    return any(
        type(one)._load_from_state_dict is not Module._load_from_state_dict
        or type(one).load_state_dict is not Module.load_state_dict
        or type(one).set_extra_state is not Module.set_extra_state
        or one._load_state_dict_pre_hooks
        or one._load_state_dict_post_hooks
        for one in module.modules()
    )


def _only_device(tensors: "Iterable[torch.Tensor]") -> "torch.device":
    """Return the CUDA device of all tensors, to stage there; the host in any other case."""
    devices = {tensor.device for tensor in tensors}
    first = next(iter(devices), None)
    if len(devices) == 1 and first is not None and first.type == "cuda":
        return first
    import torch

    return torch.device("cpu")


# All at once


def assign(
    module: "torch.nn.Module", loaded: "dict[str, torch.Tensor]", strict: bool
) -> IncompatibleKeys:
    """Make these tensors those of a module on meta; what is tied in the module stays tied."""
    import torch

    state = module.state_dict(keep_vars=True)
    tensors = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    return _load_all(module, loaded, tensors, strict, assign=True)


def _load_all(
    module: "torch.nn.Module",
    loaded: "dict[str, torch.Tensor]",
    tensors: "Mapping[str, torch.Tensor]",
    strict: bool,
    *,
    assign: bool,
) -> IncompatibleKeys:
    groups = _tied(tensors)
    for names in groups:
        given = next((name for name in reversed(names) if name in loaded), None)
        if given is not None:
            loaded |= {name: loaded[given] for name in names if name not in loaded}
    keys = module.load_state_dict(loaded, strict=strict, assign=assign)
    if assign:
        for names in groups:
            _tie(module, names)
    return IncompatibleKeys(list(keys.missing_keys), list(keys.unexpected_keys))


def _tied(tensors: "Mapping[str, torch.Tensor]") -> list[list[str]]:
    """Return the groups of names that stand for one and the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _tie(module: "torch.nn.Module", names: list[str]) -> None:
    """Make the names one tensor again: assignment gave each of them its own."""
    *others, last = names
    owner, leaf = _owner(module, last)
    for name in others:
        other, other_leaf = _owner(module, name)
        for kind in ("_parameters", "_buffers"):
            if leaf in getattr(owner, kind) and other_leaf in getattr(other, kind):
                getattr(other, kind)[other_leaf] = getattr(owner, kind)[leaf]


def _owner(module: "torch.nn.Module", name: str) -> "tuple[torch.nn.Module, str]":
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


# As the tensors arrive


def _load_streamed(
    session: Session,
    module: "torch.nn.Module",
    tensors: "Mapping[str, torch.Tensor]",
    strict: bool,
    request: Request,
    watch: Stopwatch,
) -> IncompatibleKeys:
    found = IncompatibleKeys([], [])

    def narrow(plan: Plan) -> Plan:
        """Compare keys; leave out what the module does not take."""
        known = {place.name for place in plan.places}
        tied = {n for names in _tied(tensors) if known.intersection(names) for n in names}
        found.missing_keys[:] = [n for n in tensors if n not in known and n not in tied]
        found.unexpected_keys[:] = [p.name for p in plan.places if p.name not in tensors]
        if strict and (found.missing_keys or found.unexpected_keys):
            raise RuntimeError(_refusal(module, found))
        return Plan(tuple(place for place in plan.places if place.name in tensors))

    request = Request(request.device, request.dtype, narrow=narrow)
    batch: dict[str, torch.Tensor] = {}
    batch_bytes = 0
    with TensorStream(session, request, watch) as stream:
        for name, tensor in stream:
            batch[name] = tensor
            batch_bytes += tensor.nbytes
            if batch_bytes >= _BATCH_BYTES:
                module.load_state_dict(batch, strict=False)
                batch, batch_bytes = {}, 0
    module.load_state_dict(batch, strict=False)
    return found


def _refusal(module: "torch.nn.Module", keys: IncompatibleKeys) -> str:
    """Say it in torch's words: callers and tests match them."""
    lines = []
    for kind, names in (("Missing", keys.missing_keys), ("Unexpected", keys.unexpected_keys)):
        if names:
            listed = ", ".join(f'"{name}"' for name in names)
            lines.append(f"{kind} key(s) in state_dict: {listed}. ")
    body = "\n\t".join(lines)
    return f"Error(s) in loading state_dict for {type(module).__name__}:\n\t{body}"
