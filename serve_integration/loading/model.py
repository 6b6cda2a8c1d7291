"""`load_model`: a module ready to answer. The same call in every kind of Serve deployment.

The weights are fetched on a thread of their own while the module is built, or since `prefetch` was
called. Nothing here needs Ray; inside of a replica the phases are reported as well.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from weightstream.loader.dtypes import require_torch
from weightstream.loader.options import check_dtype
from weightstream.serve_integration.loading.building import ModuleT, build_on_meta, give_weights
from weightstream.serve_integration.loading.fetching import default_device
from weightstream.serve_integration.loading.phases import Instants
from weightstream.serve_integration.loading.prefetching import Prefetch, joined
from weightstream.serve_integration.loading.reporting import is_starting, report
from weightstream.serve_integration.loading.wish import Wish, make_wish

if TYPE_CHECKING:
    import os

    import torch

    from weightstream.settings import Settings


def load_model(
    build: Callable[[], ModuleT],
    uri: "str | os.PathLike[str]",
    device: "str | int | torch.device | None" = None,
    dtype: "torch.dtype | str | None" = None,
    *,
    strict: bool = True,
    settings: "Settings | None" = None,
    storage_options: Mapping[str, object] | None = None,
) -> ModuleT:
    """Build a module, give it the weights under `uri`, and return it in eval mode, without grads.

    `build` returns the module; it runs on meta, so it costs neither memory nor time, and perhaps
    a second time when there are buffers that the file does not have. `device` is by default the GPU
    that Ray assigned, outside of Ray the first one, else the host. `dtype` casts what is loaded and
    floating. What is tied in the module stays tied. With `strict` the file has exactly the
    module's keys. Errors name the model and the cause.
    """
    wish = make_wish(uri, device, dtype, settings, storage_options)
    return finish(build, wish, strict=strict, is_start=is_starting())


async def aload_model(
    build: Callable[[], ModuleT],
    uri: "str | os.PathLike[str]",
    device: "str | int | torch.device | None" = None,
    dtype: "torch.dtype | str | None" = None,
    *,
    strict: bool = True,
    settings: "Settings | None" = None,
    storage_options: Mapping[str, object] | None = None,
) -> ModuleT:
    """Do what `load_model` does without stopping the event loop; `build` runs on another thread.

    Cancelling the task ends the load.
    """
    wish = make_wish(uri, device, dtype, settings, storage_options)
    return await afinish(build, wish, strict=strict, is_start=is_starting())


def finish(build: Callable[[], ModuleT], wish: Wish, *, strict: bool, is_start: bool) -> ModuleT:
    """Build while the weights come, and join the two; whatever fails ends the fetch."""
    return _finish(build, wish, joined(wish), strict=strict, is_start=is_start)


async def afinish(
    build: Callable[[], ModuleT], wish: Wish, *, strict: bool, is_start: bool
) -> ModuleT:
    """Do what `finish` does on a thread of its own."""
    pending = joined(wish)
    loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(1, "weightstream-aload")
    work = loop.run_in_executor(
        pool, lambda: _finish(build, wish, pending, strict=strict, is_start=is_start)
    )
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await loop.run_in_executor(None, pending.cancel)
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # LoadCancelled, as ordered
        raise
    finally:
        pool.shutdown(wait=False)


def _finish(
    build: Callable[[], ModuleT], wish: Wish, pending: Prefetch, *, strict: bool, is_start: bool
) -> ModuleT:
    try:
        require_torch()
        imported_at = time.time()
        device = default_device(pending.wish.device if wish.device is None else wish.device)
        dtype = check_dtype(pending.wish.dtype if wish.dtype is None else wish.dtype)
        module = build_on_meta(build, strict=strict)
        fetched = pending.take()
        tensors = fetched.tensors(device, dtype)
        to_device_at = time.time()
        give_weights(module, tensors, fetched.report.uri, device, strict=strict)
    except BaseException:
        pending.cancel()
        raise
    ends = Instants(
        called_at=pending.called_at,
        imported_at=imported_at,
        fetch_began_at=fetched.begun_at,
        report=fetched.report,
        to_device_at=to_device_at,
        ready_at=time.time(),
        in_memory=fetched.in_memory,
        is_start=is_start,
        agent=fetched.agent,
    )
    report(module, ends)
    return module
