"""One staged fetch: a flow, its staging, and the loop that hands tensors over as they get ready."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Priority, Wanted
from weightstream.loader.copiers import Copier, HostCopier
from weightstream.loader.gate import Gate
from weightstream.loader.plan import Place, wanted_extents
from weightstream.loader.report import Stopwatch
from weightstream.loader.session import Session
from weightstream.loader.staged import Staging

if TYPE_CHECKING:
    import torch

LOOK_S = 0.05
"""How often a consumer that waits looks whether the flow failed; arrivals wake it at once."""

_TELL_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Manner:
    """How tensors are to be brought."""

    device: "torch.device"
    in_order: bool = False
    bounded: bool = True
    """Hold the fetch back while the consumer is behind; not when everything is wanted at once."""
    whole_blobs: bool = False
    """Every byte of the blobs is wanted."""
    whole_chunks: bool = False
    """Fetch whole chunks, so that they can be kept."""
    priority: Priority = Priority.PLANNED


@dataclass(frozen=True, slots=True)
class _DeviceBudget:
    """Bounds what lies ahead on a device, which no host budget is charged for."""

    limit_bytes: int

    def try_acquire(self, count: int) -> bool:
        return True

    def release(self, count: int) -> None:
        return


class StagedFetch:
    """Begins to fetch when made; iterate it once, or close it."""

    def __init__(
        self, session: Session, places: Sequence[Place], manner: Manner, watch: Stopwatch
    ) -> None:
        self._session, self._watch, self._in_order = session, watch, manner.in_order
        engine = session.engine
        self._copier = make_copier(session, manner.device)
        self._gate: Gate | None = None
        if manner.bounded:
            on_host = isinstance(self._copier, HostCopier)
            limit_bytes = engine.budget.limit_bytes
            self._gate = Gate(engine.budget if on_host else _DeviceBudget(limit_bytes))
        self._staging = Staging(places, self._copier, self._gate, in_order=manner.in_order)
        self._began_s = watch.now_s()
        self._told_s = 0.0
        self._boosted: Place | None = None
        try:
            self._flow = session.start(_wanted(self._staging, places, manner))
        except BaseException:
            self._give_back()
            raise
        self._staging.on_room = self._flow.poke

    def __iter__(self) -> Iterator[tuple[Place, "torch.Tensor"]]:
        """Yield each tensor once, the caller's from then on; then the end-to-end check."""
        while self._staging.left:
            target = self._staging.next_ready(LOOK_S)
            if target is None:
                self._look()
                continue
            yield target.place, self._staging.hand_over(target)
            self._staging.let_go(target)
            self._tell()
        self._flow.join()
        self._watch.end_flow(self._flow, self._began_s)
        self._watch.tell(None)

    def close(self) -> None:
        """End the fetch; when it returns, nothing touches the tensors' memory. Idempotent."""
        if not self._session.is_inherited:
            self._flow.close()
            self._give_back()

    def _give_back(self) -> None:
        self._copier.close()
        if self._gate is not None:
            self._gate.close()

    def _look(self) -> None:
        """Raise what went wrong, and put what the consumer waits for before everything else."""
        head = self._staging.head
        if head is None:
            return
        place = head.place
        if self._in_order and self._boosted is not place:
            self._boosted = place
            self._flow.boost(place.blob, place.info.extent)
        try:
            self._flow.wait(place.blob, place.info.extent, timeout_s=0.0)
        except TimeoutError:
            self._tell()

    def _tell(self) -> None:
        now_s = self._watch.now_s()
        if self._watch.callback is not None and now_s - self._told_s >= _TELL_EVERY_S:
            self._told_s = now_s
            self._watch.tell(self._flow)


def make_copier(session: Session, device: "torch.device") -> Copier:
    """Return the copier for a device; what is neither CUDA nor host is reached from the host."""
    if device.type == "cuda":
        from weightstream.loader.cuda import CudaCopier

        return CudaCopier(device, session.engine.budget)
    return HostCopier(session.engine.slabs.try_take)


def _wanted(staging: Staging, places: Sequence[Place], manner: Manner) -> list[Wanted]:
    by_blob: dict[Blob, list[Place]] = {}
    for place in places:
        by_blob.setdefault(place.blob, []).append(place)
    return [
        Wanted(
            blob,
            staging.landings[blob],
            _extents(blob, found, manner),
            manner.priority,
            manner.whole_chunks,
        )
        for blob, found in by_blob.items()
    ]


def _extents(blob: Blob, places: Sequence[Place], manner: Manner) -> tuple[Extent, ...]:
    if not manner.whole_blobs:
        return wanted_extents(places)
    if manner.in_order:  # in the order of the tensors, then whatever is left: the header
        return (*(place.info.extent for place in places), blob.whole())
    return (blob.whole(),)
