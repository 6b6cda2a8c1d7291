"""The public calls of the loader; each is a thin shell that checks its arguments and runs one job.

Thread-safe and fork-safe: calls share nothing but the process's engine and store, which a forked
child makes anew.
"""

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from weightstream.errors import UsageError
from weightstream.loader.into import IncompatibleKeys, load_module
from weightstream.loader.opened import OpenedModel, open_model
from weightstream.loader.options import Device, check_device, check_dtype, check_names
from weightstream.loader.report import ProgressCallback, Stopwatch
from weightstream.loader.session import Session, StorageOptions, Uri
from weightstream.loader.streamed import Order, Request, TensorStream
from weightstream.loader.whole import Loaded, load_whole
from weightstream.settings import Settings, load_settings

if TYPE_CHECKING:
    import torch


def load(
    uri: Uri,
    device: Device = "cpu",
    dtype: "torch.dtype | str | None" = None,
    names: Iterable[str] | None = None,
    progress: ProgressCallback | None = None,
    *,
    settings: Settings | None = None,
    storage_options: StorageOptions | None = None,
) -> "dict[str, torch.Tensor]":
    """Load a model's weights and return its state dict.

    `uri` is a prefix with safetensors files (sharded or not), one such file, or an index; on any
    origin that fsspec reaches, or a local path. The tensors own their memory: write to them, or
    drop one and its memory is free. `names` brings those tensors and only their bytes. `dtype`
    casts floating tensors. `progress` is called on this thread with a `Progress`; what it raises
    ends the load.
    """
    request = Request(check_device(device), check_dtype(dtype), check_names(names), bounded=False)
    with Session(uri, settings or load_settings(), storage_options) as session:
        return load_whole(session, request, Stopwatch(session.uri, progress)).tensors


def load_with_report(
    uri: Uri,
    device: Device = "cpu",
    dtype: "torch.dtype | str | None" = None,
    names: Iterable[str] | None = None,
    progress: ProgressCallback | None = None,
    *,
    settings: Settings | None = None,
    storage_options: StorageOptions | None = None,
) -> Loaded:
    """Do what `load` does, and return its phases too."""
    request = Request(check_device(device), check_dtype(dtype), check_names(names), bounded=False)
    with Session(uri, settings or load_settings(), storage_options) as session:
        return load_whole(session, request, Stopwatch(session.uri, progress))


async def aload(
    uri: Uri,
    device: Device = "cpu",
    dtype: "torch.dtype | str | None" = None,
    names: Iterable[str] | None = None,
    progress: ProgressCallback | None = None,
    *,
    settings: Settings | None = None,
    storage_options: StorageOptions | None = None,
) -> "dict[str, torch.Tensor]":
    """Do what `load` does, from an event loop; cancelling the task ends the load.

    `progress` is called on the loading thread, not on the loop's.
    """
    request = Request(check_device(device), check_dtype(dtype), check_names(names), bounded=False)
    session = Session(uri, settings or load_settings(), storage_options)

    def work() -> Loaded:
        with session:
            return load_whole(session, request, Stopwatch(session.uri, progress))

    loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(1, "weightstream-aload")
    running = loop.run_in_executor(pool, work)
    try:
        return (await asyncio.shield(running)).tensors
    except asyncio.CancelledError:
        await loop.run_in_executor(None, session.cancel)
        await asyncio.wait({running})
        running.exception()  # LoadCancelled, as ordered
        raise
    finally:
        pool.shutdown(wait=False)


def stream(
    uri: Uri,
    device: Device = "cpu",
    dtype: "torch.dtype | str | None" = None,
    names: Iterable[str] | None = None,
    progress: ProgressCallback | None = None,
    *,
    order: Order = "readiness",
    settings: Settings | None = None,
    storage_options: StorageOptions | None = None,
) -> TensorStream:
    """Return an iterator of (name, tensor) whose memory does not grow with the model.

    What was fetched and not yet handed over stays within half of the memory budget, or is the one
    tensor that is waited for. `readiness` yields as tensors arrive; `natural` in the order in which
    a model is built (layer 2 before layer 10). Close it, or use it in a `with`, to end it early.
    An object replaced in mid-stream restarts it only if nothing was yielded yet.
    """
    if order not in ("readiness", "natural"):
        raise UsageError(f"order: {order!r} is neither 'readiness' nor 'natural'")
    request = Request(check_device(device), check_dtype(dtype), check_names(names), order)
    session = Session(uri, settings or load_settings(), storage_options)
    return TensorStream(session, request, Stopwatch(session.uri, progress))


def load_into(
    module: "torch.nn.Module",
    uri: Uri,
    strict: bool = True,
    device: "Device | None" = None,
    dtype: "torch.dtype | str | None" = None,
    progress: ProgressCallback | None = None,
    *,
    settings: Settings | None = None,
    storage_options: StorageOptions | None = None,
) -> "IncompatibleKeys":
    """Load a model's weights into a module; returns missing and unexpected keys as torch does.

    A module on meta gets the loaded tensors themselves (`assign=True`), on `device` (the host). A
    module with memory is copied into as the tensors arrive, in torch's way with dtypes. Parameters
    that are tied in the module stay tied, and one name in the file is enough for them.
    """
    target = None if device is None else check_device(device)
    with Session(uri, settings or load_settings(), storage_options) as session:
        watch = Stopwatch(session.uri, progress)
        return load_module(session, module, strict, target, check_dtype(dtype), watch)


def open(
    uri: Uri,
    device: Device = "cpu",
    *,
    settings: Settings | None = None,
    storage_options: StorageOptions | None = None,
) -> OpenedModel:
    """Open a model, or one file of it, with the surface of `safetensors.safe_open`.

    Headers are read now; a tensor's bytes when it is asked for.
    """
    session = Session(uri, settings or load_settings(), storage_options)
    return open_model(session, check_device(device))
