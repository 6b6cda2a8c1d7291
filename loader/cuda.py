"""Copies into CUDA memory: pinned slabs, one copy stream, an event per tensor.

Pinned memory is slow to make (a gigabyte can cost more than it saves), so slabs are few, reused for
the whole load, and come from torch's caching host allocator, which keeps them for the next load.
Pageable memory would move at a fifth of the rate, and synchronously.

Tensors are allocated on the copy stream; `finish` makes the consumer's stream wait for the tensor's
own event and tells the allocator of that second stream, so nothing waits on the host.
"""

import ctypes
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from weightstream.cachefs.fetch.memory import PAGE_BYTES, round_up
from weightstream.loader.copiers import Staged
from weightstream.loader.gate import Budget
from weightstream.loader.plan import Place
from weightstream.loader.views import torch_shape, torch_type

if TYPE_CHECKING:
    import torch

_CLASS_BYTES = 1 << 20


@dataclass(slots=True, eq=False)
class CudaTarget:
    """One tensor's device memory, and the event after its last copy so far."""

    memory: "torch.Tensor"
    event: "torch.cuda.Event | None" = None


@dataclass(slots=True, eq=False)
class PinnedSlab:
    """Page-locked staging memory; starts on a page, so that the write-back can use O_DIRECT."""

    tensor: "torch.Tensor"
    view: memoryview
    pool: "CudaCopier"
    users: int = 1
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self) -> None:
        """Keep the slab for one more user."""
        with self.lock:
            self.users += 1

    def release(self) -> None:
        """Say that one user is done."""
        with self.lock:
            self.users -= 1
            last = self.users == 0
        if last:
            self.pool.take_back(self)


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy that the device was told to make, and the slab that it reads."""

    event: "torch.cuda.Event"
    slab: Staged


class CudaCopier:
    """A `Copier` for one CUDA device. Thread-safe."""

    def __init__(self, device: "torch.device", budget: Budget) -> None:
        import torch

        self._device = device
        self._budget = budget
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[_Copy] = deque()
        self._idle: list[torch.Tensor] = []
        self._closed = False
        self._lock = threading.Lock()

    def take_slab(self, count: int) -> PinnedSlab | None:
        """Return a pinned slab, charged to the budget for as long as the load keeps it."""
        self._reap()
        size = round_up(max(count, 1), _CLASS_BYTES)
        with self._lock:
            memory = next((idle for idle in self._idle if _room(idle) >= size), None)
            if memory is not None:
                self._idle.remove(memory)
        if memory is None:
            memory = self._allocate(size)
        return None if memory is None else PinnedSlab(*_aligned(memory, count), self)

    def new_target(self, place: Place) -> CudaTarget:
        """Allocate on the copy stream, so that the first copy needs to wait for nothing."""
        import torch

        with torch.cuda.stream(self._stream):
            count = len(place.info.extent)
            return CudaTarget(torch.empty(count, dtype=torch.uint8, device=self._device))

    def copy(self, target: object, at: int, slab: Staged, start: int, count: int) -> None:
        """Issue the copy; the slab is held until the device has read it."""
        import torch

        assert isinstance(target, CudaTarget)
        source = torch.frombuffer(slab.view, dtype=torch.uint8, count=count, offset=start)
        slab.hold()
        # One lock around copy and event: the event that stays is behind every copy before it.
        with self._lock, torch.cuda.stream(self._stream):
            target.memory[at : at + count].copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            target.event = event
            self._under_way.append(_Copy(event, slab))

    def finish(self, target: object, place: Place) -> "torch.Tensor":
        """Return the tensor; the consumer's stream, not its thread, waits for the bytes."""
        import torch

        assert isinstance(target, CudaTarget)
        current = torch.cuda.current_stream(self._device)
        if target.event is not None:
            current.wait_event(target.event)
        else:
            current.wait_stream(self._stream)
        target.memory.record_stream(current)
        self._reap()
        dtype, shape = torch_type(place.blob, place.info), torch_shape(place.blob, place.info)
        return target.memory.view(dtype).reshape(shape)

    def close(self) -> None:
        """Wait for the device to have read every slab, and give the memory back."""
        self._stream.synchronize()
        self._reap()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for memory in idle:
            self._budget.release(len(memory))

    def take_back(self, slab: PinnedSlab) -> None:
        """Hear that nobody uses a slab any more."""
        memory = slab.tensor
        with self._lock:
            if not self._closed:
                self._idle.append(memory)
                return
        self._budget.release(len(memory))

    def _allocate(self, size: int) -> "torch.Tensor | None":
        import torch

        total = size + PAGE_BYTES
        while not self._budget.try_acquire(total):
            with self._lock:
                smaller = self._idle.pop() if self._idle else None
            if smaller is None:
                return None
            self._budget.release(len(smaller))
        return torch.empty(total, dtype=torch.uint8, pin_memory=True)

    def _reap(self) -> None:
        """Let go of the slabs whose copies are done, oldest first: the stream works in order."""
        done = []
        with self._lock:
            while self._under_way and _is_done(self._under_way[0]):
                done.append(self._under_way.popleft().slab)
        for slab in done:
            slab.release()


def _is_done(copy: _Copy) -> bool:
    done: bool = copy.event.query()  # type: ignore[no-untyped-call]
    return done


def _room(memory: "torch.Tensor") -> int:
    return len(memory) - PAGE_BYTES


def _aligned(memory: "torch.Tensor", count: int) -> tuple["torch.Tensor", memoryview]:
    """Return the memory with a view of `count` bytes that starts on a page."""
    start = round_up(memory.data_ptr(), PAGE_BYTES)
    return memory, memoryview((ctypes.c_ubyte * count).from_address(start)).cast("B")
