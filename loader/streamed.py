"""`stream`: tensors one by one, as they arrive or in the model's own order, in bounded memory.

What is mapped already is handed over first (readiness) or when its turn comes (natural); the rest
is staged. Nothing is fetched further ahead of the consumer than the gate lets through.
"""

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from weightstream.errors import LoadCancelled, ObjectChangedError
from weightstream.loader.fetching import Manner, StagedFetch
from weightstream.loader.gather import Weights, find_weights
from weightstream.loader.headers import fetch_headers, mapped_header
from weightstream.loader.options import cast
from weightstream.loader.plan import Place, Plan, Shard, make_plan, natural_order
from weightstream.loader.report import Stopwatch
from weightstream.loader.resolve import Resolved, resolve
from weightstream.loader.session import Session
from weightstream.loader.views import check_types, tensor_over

if TYPE_CHECKING:
    import torch

Order: TypeAlias = Literal["readiness", "natural"]
Named: TypeAlias = "tuple[str, torch.Tensor]"


@dataclass(frozen=True, slots=True)
class Request:
    """What a stream is to bring, and where."""

    device: "torch.device"
    dtype: "torch.dtype | None" = None
    names: frozenset[str] | None = None
    order: Order = "readiness"
    bounded: bool = True
    narrow: Callable[[Plan], Plan] | None = None
    """Sees the plan before a tensor's byte is fetched; may refuse it, or leave tensors out."""


class TensorStream:
    """An iterator of (name, tensor); closing it, or leaving its `with`, ends the fetch."""

    def __init__(self, session: Session, request: Request, watch: Stopwatch) -> None:
        self._session = session
        self._tensors = _restartable(session, request, watch)
        self._closed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Named:
        if self._closed:
            raise StopIteration
        try:
            return next(self._tensors)
        except LoadCancelled as error:
            raise LoadCancelled(f"{self._session.uri}: the stream was closed") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the fetch and forget what was not handed over. Idempotent; any thread may call it."""
        self._closed = True
        self._session.cancel()
        with suppress(ValueError):  # it runs on another thread, where the cancelled flow ends it
            self._tensors.close()
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # The collector may run this on a fetching thread, which must not wait for itself.
        if threading.current_thread().name.startswith("weightstream-"):
            threading.Thread(target=self.close, name="weightstream-close", daemon=True).start()
        else:
            self.close()


def _restartable(
    session: Session, request: Request, watch: Stopwatch
) -> Generator[Named, None, None]:
    """Stream; when an object was replaced before anything was handed over, begin again once."""
    handed_over = False
    try:
        for named in stream_once(session, resolve(session), request, watch):
            handed_over = True
            yield named
        return
    except ObjectChangedError:
        if handed_over:  # two versions must never mix in one model
            raise
    yield from stream_once(session, resolve(session, ask_origin=True), request, watch)


def stream_once(
    session: Session, resolved: Resolved, request: Request, watch: Stopwatch
) -> Iterator[Named]:
    """Yield every wanted tensor of one version of the model."""
    watch.resolve_s = watch.now_s()
    weights = find_weights(session, resolved, request.names)
    plan = _plan(session, weights, request.names)
    everything = len(plan.places) if request.names is None else -1
    plan = request.narrow(plan) if request.narrow else plan
    watch.header_s = watch.now_s()
    in_order = request.order == "natural"
    places = natural_order(plan.places) if in_order else list(plan.places)
    mapped = weights.memories if request.device.type == "cpu" else {}
    watch.mapped_bytes = sum(len(p.info.extent) for p in places if p.blob in mapped)
    staged = [place for place in places if place.blob not in mapped]

    def finish(place: Place, tensor: "torch.Tensor") -> Named:
        if tensor.device.type != request.device.type:
            tensor = tensor.to(request.device)
        return place.name, cast(tensor, request.dtype)

    def view(place: Place) -> Named:
        start = place.info.extent.start
        return finish(place, tensor_over(mapped[place.blob], start, place.blob, place.info))

    if not staged:
        yield from map(view, places)
        return
    manner = Manner(
        request.device, in_order, request.bounded, whole_blobs=len(plan.places) == everything
    )
    fetch = StagedFetch(session, staged, manner, watch)
    try:
        fetched = iter(fetch)
        for place in places:
            if place.blob in mapped:
                yield view(place)
            elif in_order:
                yield finish(*next(fetched))
        for place, tensor in fetched:
            yield finish(place, tensor)
    finally:
        fetch.close()


def _plan(session: Session, weights: Weights, names: frozenset[str] | None) -> Plan:
    fetched = fetch_headers(session, weights.missing) if weights.missing else {}
    shards = [
        Shard(blob, fetched[blob].header)
        if blob in fetched
        else Shard(blob, mapped_header(blob, weights.memories[blob]))
        for blob in weights.blobs
    ]
    plan = make_plan(shards, weights.index, names)
    check_types(plan.places)
    return plan
