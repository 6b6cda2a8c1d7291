"""Telling a source what a flow is going to want, beside the flow and never in its way."""

import logging
import threading
from collections.abc import Sequence

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.flow import Flow
from weightstream.cachefs.fetch.landing import Priority
from weightstream.cachefs.fetch.piece import Part
from weightstream.cachefs.fetch.source import Plans
from weightstream.errors import WeightstreamError

log = logging.getLogger(__name__)


def tell(source: Plans, parts: Sequence[Part], flow: Flow) -> None:
    """Tell `source` of what is planned and not stored; returns at once.

    Not of single demands and what comes along with them: those are asked for before the source
    could begin by itself.
    """
    wanted = missing(parts)
    if wanted:
        threading.Thread(
            target=_tell, args=(source, wanted, flow), daemon=True, name="weightstream-plan"
        ).start()


def missing(parts: Sequence[Part]) -> tuple[tuple[Blob, tuple[Extent, ...]], ...]:
    """Return the planned extents, in the order in which they are wanted, that no store has."""
    found: dict[Blob, list[Extent]] = {}
    if any(part.priority is Priority.DEMAND for part in parts):
        return ()
    for part in parts:
        states = part.stored.states() if part.stored is not None else b""
        lacking = [p.extent for p in part.planned if not any(states[p.chunk : p.chunk + 1])]
        found.setdefault(part.blob, []).extend(lacking)
    return tuple((blob, joined(extents)) for blob, extents in found.items() if extents)


def joined(extents: Sequence[Extent]) -> tuple[Extent, ...]:
    """Return the extents with those joined that follow each other without a gap."""
    runs: list[Extent] = []
    for extent in extents:
        if runs and runs[-1].stop == extent.start:
            runs[-1] = Extent(runs[-1].start, extent.stop)
        else:
            runs.append(extent)
    return tuple(runs)


def _tell(source: Plans, wanted: Sequence[tuple[Blob, tuple[Extent, ...]]], flow: Flow) -> None:
    try:
        flow.planned(source.plan(wanted))
    except WeightstreamError as error:  # a source that is closing: the flow hears of it elsewhere
        log.debug("no plan: %s", error)
