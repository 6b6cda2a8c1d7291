"""What the thread of a prefetch does: bytes into host memory, or staged to a CUDA device.

For the host nothing waits for torch before the transfer runs. For CUDA torch has to be there first,
because bytes go to the device as they arrive and are never held on the host as a whole.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from weightstream.errors import OriginError
from weightstream.loader.gather import Gathered, find_weights, gather
from weightstream.loader.options import Device, cast, check_device, check_dtype
from weightstream.loader.report import LoadReport, Stopwatch
from weightstream.loader.resolve import Resolved
from weightstream.loader.session import Session
from weightstream.loader.streamed import Request
from weightstream.loader.whole import in_one_version, load_whole, to_tensors
from weightstream.serve_integration.loading.offline import borrow_listing
from weightstream.serve_integration.loading.residency import mostly_resident
from weightstream.serve_integration.loading.upstream import AgentCounts
from weightstream.serve_integration.loading.wish import Wish
from weightstream.settings import load_settings

if TYPE_CHECKING:
    import torch

Content: TypeAlias = "Gathered | dict[str, torch.Tensor]"

_NVIDIA = Path("/dev/nvidiactl")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A model's bytes in this process, and what it took; the tensors are made when joined."""

    content: "Content"
    report: LoadReport
    begun_at: float
    """Unix time at which the report's clock began."""
    in_memory: bool
    """What was mapped was in the page cache."""
    agent: AgentCounts
    """Asked when the fetch began."""

    def tensors(
        self, device: "torch.device", dtype: "torch.dtype | None"
    ) -> "dict[str, torch.Tensor]":
        """Return the state dict on a device; floating tensors in `dtype`."""
        if isinstance(self.content, Gathered):
            return to_tensors(self.content, Request(device, dtype))
        return {name: cast(tensor.to(device), dtype) for name, tensor in self.content.items()}


def fetch(wish: Wish, attach: Callable[[Session], None]) -> Fetched:
    """Fetch what is wished; `attach` gets the session, by which the fetch can be cancelled."""
    with Session(wish.uri, wish.settings or load_settings(), wish.storage_options) as session:
        attach(session)
        begun_at, watch = time.time(), Stopwatch(session.uri)
        agent = AgentCounts(session.settings.run_directory)
        try:
            content, in_memory = _fetch(session, wish, watch)
        except OriginError as error:
            if not borrow_listing(session, error):
                raise
            content, in_memory = _fetch(session, wish, watch)
        count = len(content.plan.places) if isinstance(content, Gathered) else len(content)
        return Fetched(content, watch.report(count), begun_at, in_memory, agent)


def _fetch(session: Session, wish: Wish, watch: Stopwatch) -> "tuple[Content, bool]":
    """Return the bytes, and whether what was mapped was in the page cache."""
    if wants_cuda(wish.device):
        request = Request(default_device(wish.device), check_dtype(wish.dtype), bounded=False)
        return load_whole(session, request, watch).tensors, False
    return _fetch_host(session, watch)


def _fetch_host(session: Session, watch: Stopwatch) -> "tuple[Content, bool]":
    in_memory = False

    def work(resolved: Resolved) -> Gathered:
        nonlocal in_memory
        watch.resolve_s = watch.now_s()
        weights = find_weights(session, resolved, None)
        in_memory = mostly_resident(weights.memories.values())
        return gather(session, weights, None, watch)

    return in_one_version(session, work), in_memory


def wants_cuda(device: Device | None) -> bool:
    """Say, without torch where that can be, whether tensors go to a CUDA device."""
    if device is not None:
        return isinstance(device, int) or str(device).startswith("cuda")
    assigned = _gpus_assigned()
    if assigned is not None:
        return assigned
    return _NVIDIA.exists() and default_device(None).type == "cuda"


def default_device(device: Device | None) -> "torch.device":
    """Return the device that is meant: a GPU where Ray assigned one, or where there is one."""
    if device is not None:
        return check_device(device)
    import torch

    assigned = _gpus_assigned()
    wanted = torch.cuda.is_available() if assigned is None else assigned
    return check_device("cuda" if wanted else "cpu")


def _gpus_assigned() -> bool | None:
    """Say whether Ray gave this worker a GPU, or a part of one; None outside of a worker."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    mode = getattr(getattr(context, "worker", None), "mode", None)
    if mode is None or mode != getattr(ray, "WORKER_MODE", None):
        return None
    return bool(context.get_accelerator_ids().get("GPU"))
