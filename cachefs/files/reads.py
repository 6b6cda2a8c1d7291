"""Reads that wait for their bytes: a ticket each, no thread each.

A mount may have a hundred page faults waiting for the network at once. Each is a `Ticket` in a
list; it is answered by the thread that brings its last byte, by a failure, by a cancel or by its
deadline, whichever comes first, and exactly once.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from weightstream.cachefs.blob import Extent
from weightstream.errors import WeightstreamError

if TYPE_CHECKING:
    from weightstream.cachefs.files.tree import File

log = logging.getLogger(__name__)

Reply: TypeAlias = Callable[[Sequence[memoryview], WeightstreamError | None], None]
"""Called once with the views that together are the extent, or with nothing and the error."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A read under way. `answered` is set once, under the lock of who owns the list."""

    file: "File"
    extent: Extent
    reply: Reply
    deadline_s: float
    begun_s: float = field(default_factory=time.monotonic)
    answered: bool = False


class Parked:
    """The tickets that wait, by blob. Not thread-safe: the caller's lock guards every call."""

    def __init__(self) -> None:
        self._by_blob: dict[str, list[Ticket]] = {}

    def __len__(self) -> int:
        return sum(len(tickets) for tickets in self._by_blob.values())

    def add(self, ticket: Ticket) -> None:
        """Let a ticket wait."""
        self._by_blob.setdefault(ticket.file.blob.id, []).append(ticket)

    def of(self, blob_id: str, extent: Extent | None = None) -> list[Ticket]:
        """Return the tickets that wait for a blob, or for bytes in a part of it."""
        tickets = self._by_blob.get(blob_id, [])
        if extent is None:
            return list(tickets)
        return [t for t in tickets if t.extent.start < extent.stop and extent.start < t.extent.stop]

    def take(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """Remove those that still wait and mark them answered: whoever takes one answers it."""
        taken = []
        for ticket in tickets:
            if not ticket.answered:
                ticket.answered = True
                taken.append(ticket)
                waiting = self._by_blob.get(ticket.file.blob.id, [])
                if ticket in waiting:
                    waiting.remove(ticket)
                if not waiting:
                    self._by_blob.pop(ticket.file.blob.id, None)
        return taken

    def everybody(self) -> list[Ticket]:
        """Return all that wait."""
        return [ticket for tickets in self._by_blob.values() for ticket in tickets]

    def overdue(self, now_s: float) -> list[Ticket]:
        """Return those whose deadline has passed."""
        return [ticket for ticket in self.everybody() if ticket.deadline_s <= now_s]


def answer(ticket: Ticket, views: Sequence[memoryview], error: WeightstreamError | None) -> None:
    """Call the reply; one that raises is a bug of the driver's and must not end our thread."""
    try:
        ticket.reply(views, error)
    except Exception:
        log.exception("a reply to %s %s failed", ticket.file.path, ticket.extent)
