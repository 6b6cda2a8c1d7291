"""Staged landing: ranges land in reusable slabs and are copied on into tensors of their own.

For tensors on a device, and for streams, whose memory must not grow with the model. The copy is
made on the fetching threads as bytes arrive, so it overlaps the network; a slab goes back when its
copies are done and the write-back has let go of it.

Shared by the engine's threads (reserve, landed) and one consumer (next_ready). `_lock` guards the
targets' counts and the ready queue; no copy, wait or engine call is made under it.
"""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.memory import allocate
from weightstream.loader.copiers import Copier, Staged
from weightstream.loader.gate import Gate
from weightstream.loader.plan import Place

if TYPE_CHECKING:
    import torch

_MOST_SPARES = 2


@dataclass(slots=True, eq=False)
class Target:
    """One tensor on its way."""

    place: Place
    left_bytes: int
    memory: object = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True, eq=False)
class StagedLease:
    """A slab for one range. The gate's count of its bytes moves to the targets as they land."""

    view: memoryview
    slab: Staged
    extent: Extent
    owner: "StagedLanding"
    unlanded_bytes: int
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
            self.owner.ended(self)
            self.slab.release()


class Staging:
    """The tensors of one flow on their way, in the order in which they are wanted."""

    def __init__(
        self,
        places: Sequence[Place],
        copier: Copier,
        gate: Gate | None,
        *,
        in_order: bool,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self.copier = copier
        self.gate = gate
        self.on_room = on_room
        self._in_order = in_order
        self._changed = threading.Condition(threading.Lock())
        self._order = deque(Target(place, len(place.info.extent)) for place in places)
        self._ready = deque(target for target in self._order if target.left_bytes == 0)
        self._spares = 0
        self.left = len(places)
        by_blob: dict[Blob, list[Target]] = {}
        for target in self._order:
            by_blob.setdefault(target.place.blob, []).append(target)
        self.landings = {blob: StagedLanding(self, found) for blob, found in by_blob.items()}

    # The consumer

    @property
    def head(self) -> Target | None:
        """Return the tensor that everything waits for: the first that has not arrived."""
        with self._changed:
            return self._head()

    @property
    def has_ready(self) -> bool:
        """Say whether a tensor waits to be handed over."""
        with self._changed:
            return self._is_ready()

    def next_ready(self, wait_s: float) -> Target | None:
        """Return the next tensor to hand over, or None when it did not arrive in time."""
        with self._changed:
            if not self._is_ready():
                self._changed.wait(wait_s)
            if not self._is_ready():
                return None
            target = self._order.popleft() if self._in_order else self._ready.popleft()
            self.left -= 1
            return target

    def hand_over(self, target: Target) -> "torch.Tensor":
        """Return a ready tensor, which is the caller's now."""
        memory = target.memory
        if memory is None:
            memory = self.copier.new_target(target.place)
        target.memory = None
        return self.copier.finish(memory, target.place)

    def let_go(self, target: Target) -> None:
        """Stop to count a tensor: the consumer came back for the next one.

        Until then it counts, so that the one that is being used has room in the bound too.
        """
        count = len(target.place.info.extent)
        if self.gate is not None and count and self.gate.let_go(count):
            self.on_room()

    def _is_ready(self) -> bool:
        if self._in_order:
            return bool(self._order) and self._order[0].left_bytes == 0
        return bool(self._ready)

    def _head(self) -> Target | None:
        while not self._in_order and self._order and self._order[0].left_bytes == 0:
            self._order.popleft()
        return self._order[0] if self._order else None

    # The landings

    def admit(self, landing: "StagedLanding", extent: Extent, count: int) -> Staged | None:
        """Return a slab for a range with `count` wanted bytes, or None when there is no room."""
        starving = self._starves_for(landing, extent)
        if self.gate is not None and not self.gate.admit(count, starving=starving):
            return None
        slab = self.copier.take_slab(len(extent))
        if slab is None and starving:
            slab = self._take_spare(len(extent))
        if slab is None and self.gate is not None:
            self.gate.let_go(count)
        return slab

    def arrived(self, target: Target, count: int) -> None:
        """Hear that `count` more bytes of a tensor are in place."""
        with self._changed:
            target.left_bytes -= count
            if target.left_bytes == 0:
                if not self._in_order:
                    self._ready.append(target)
                self._changed.notify_all()

    def wake(self) -> None:
        """Let the consumer look up."""
        with self._changed:
            self._changed.notify_all()

    def _starves_for(self, landing: "StagedLanding", extent: Extent) -> bool:
        with self._changed:
            if self._is_ready():
                return False
            head = self._head()
        if head is None:
            return True
        wanted = head.place.info.extent
        same = landing.blob == head.place.blob
        return same and extent.start < wanted.stop and wanted.start < extent.stop

    def _take_spare(self, count: int) -> Staged | None:
        with self._changed:
            if self._spares >= _MOST_SPARES:
                return None
            self._spares += 1
        return _Spare(count, self._spare_is_back)

    def _spare_is_back(self) -> None:
        with self._changed:
            self._spares -= 1


class _Spare:
    """Memory for one range beside the budget; pageable, which every copier can read."""

    def __init__(self, count: int, on_end: Callable[[], None]) -> None:
        self._memory = allocate(count)
        self.view = memoryview(self._memory)[:count]
        self._on_end = on_end
        self._users = 1
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Keep it for one more user."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """Say that one user is done."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self._on_end()


class StagedLanding:
    """The landing of one blob: finds out which tensors the bytes of a range belong to."""

    exposes_memory = False

    def __init__(self, staging: Staging, targets: Sequence[Target]) -> None:
        self._staging = staging
        self._targets = sorted(
            (target for target in targets if target.left_bytes), key=lambda t: t.place.info.extent
        )
        self._starts = [target.place.info.extent.start for target in self._targets]
        self._leases: dict[int, StagedLease] = {}
        self._lock = threading.Lock()
        self.blob = targets[0].place.blob

    @property
    def holds_back(self) -> bool:
        """Say that the consumer is behind, and not the memory short."""
        return self._staging.has_ready

    def reserve(self, extent: Extent) -> StagedLease | None:
        """Return a slab for `extent`, or None while the consumer is far behind."""
        count = sum(stop - start for _, start, stop in self._overlaps(extent))
        slab = self._staging.admit(self, extent, count)
        if slab is None:
            return None
        lease = StagedLease(slab.view, slab, extent, self, count)
        with self._lock:
            self._leases[extent.start] = lease
        return lease

    def landed(self, extent: Extent) -> None:
        """Copy what landed into the tensors that it belongs to."""
        lease = self._lease_of(extent)
        for target, start, stop in self._overlaps(extent):
            with target.lock:
                if target.memory is None:
                    target.memory = self._staging.copier.new_target(target.place)
            self._staging.copier.copy(
                target.memory,
                start - target.place.info.extent.start,
                lease.slab,
                start - lease.extent.start,
                stop - start,
            )
            with lease.lock:
                lease.unlanded_bytes -= stop - start
            self._staging.arrived(target, stop - start)

    def ended(self, lease: StagedLease) -> None:
        """Hear that nobody uses a lease any more; what did not land in it is not held either."""
        with self._lock:
            if self._leases.get(lease.extent.start) is lease:
                del self._leases[lease.extent.start]
        if self._staging.gate is not None and lease.unlanded_bytes:
            self._staging.gate.let_go(lease.unlanded_bytes)

    def _lease_of(self, extent: Extent) -> StagedLease:
        with self._lock:
            found = self._leases.get(extent.start)
            if found is not None:
                return found
            return next(
                lease
                for lease in self._leases.values()
                if lease.extent.start <= extent.start and extent.stop <= lease.extent.stop
            )

    def _overlaps(self, extent: Extent) -> Iterator[tuple[Target, int, int]]:
        """Yield the tensors that share bytes with `extent`, and which bytes."""
        first = max(0, bisect_right(self._starts, extent.start) - 1)
        for target in islice(self._targets, first, None):
            wanted = target.place.info.extent
            if wanted.start >= extent.stop:
                return
            start, stop = max(extent.start, wanted.start), min(extent.stop, wanted.stop)
            if start < stop:
                yield target, start, stop
