"""`load`: the whole state dict at once, on the host in file layout or staged to a device."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from weightstream.errors import NotFoundError, ObjectChangedError
from weightstream.loader.gather import Gathered, find_weights, gather
from weightstream.loader.options import cast
from weightstream.loader.report import LoadReport, Stopwatch
from weightstream.loader.resolve import Resolved, resolve
from weightstream.loader.session import Session
from weightstream.loader.streamed import Request, stream_once
from weightstream.loader.views import tensor_over

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A state dict and what it took."""

    tensors: "dict[str, torch.Tensor]"
    report: LoadReport


def load_whole(session: Session, request: Request, watch: Stopwatch) -> Loaded:
    """Load the model; when an object is replaced meanwhile, once more in its new version."""
    return in_one_version(session, lambda files: _load_once(session, files, request, watch))


def in_one_version(session: Session, work: Callable[[Resolved], _T]) -> _T:
    """Do work on the model's files; once more from the start when one is replaced meanwhile."""
    resolved = resolve(session)
    try:
        return work(resolved)
    except (ObjectChangedError, NotFoundError) as error:
        if isinstance(error, NotFoundError) and resolved.confirmed:
            raise
        log.info("starting over with the present version: %s", error)
    return work(resolve(session, ask_origin=True))


def _load_once(session: Session, resolved: Resolved, request: Request, watch: Stopwatch) -> Loaded:
    watch.resolve_s = watch.now_s()
    if request.device.type == "cuda":
        tensors = dict(stream_once(session, resolved, request, watch))
    else:
        tensors = _load_host(session, resolved, request, watch)
        watch.tell(None)
    report = watch.report(len(tensors))
    log.info(
        "loaded %s: %d tensors, %d bytes in %.3f s from %s",
        session.uri,
        report.tensors,
        report.bytes_total,
        report.ready_s,
        dict(report.bytes_by_source),
    )
    return Loaded(tensors, report)


def _load_host(
    session: Session, resolved: Resolved, request: Request, watch: Stopwatch
) -> "dict[str, torch.Tensor]":
    weights = find_weights(session, resolved, request.names)
    return to_tensors(gather(session, weights, request.names, watch), request)


def to_tensors(gathered: Gathered, request: Request) -> "dict[str, torch.Tensor]":
    """Build the tensors over the gathered memory; a cast or moved one frees its pages at once."""
    tensors = {}
    for place in gathered.plan.places:
        memory, start = gathered.memories[place.blob], place.info.extent.start
        tensor = cast(tensor_over(memory, start, place.blob, place.info), request.dtype)
        tensors[place.name] = tensor.to(request.device) if request.device.type != "cpu" else tensor
    return tensors
