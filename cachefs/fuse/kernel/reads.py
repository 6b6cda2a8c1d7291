"""READ: the one request that is made millions of times.

No object between the kernel's message and `Content.read` but the reply, which writes the views that
it is given straight to the kernel: measured (2 cores, 1 MiB requests), a copy or a thread's wake-up
each cost more than all of this module.
"""

import errno
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from weightstream import metrics
from weightstream.cachefs.blob import Extent
from weightstream.cachefs.files.entries import File
from weightstream.cachefs.fuse.kernel.connection import Connection, Refusal
from weightstream.cachefs.fuse.kernel.nodes import Nodes
from weightstream.cachefs.fuse.kernel.protocol import Op
from weightstream.cachefs.fuse.kernel.waiting import Waiting
from weightstream.errors import WeightstreamError

if TYPE_CHECKING:
    from weightstream.cachefs.files.content import Content
    from weightstream.cachefs.files.reads import Ticket

log = logging.getLogger(__name__)

_READ = int(Op.READ)
_CACHED = metrics.FUSE_READ_BYTES.labels("cached")
_DIRECT = metrics.FUSE_READ_BYTES.labels("direct")


class Reads:
    """Answers to READ. Thread-safe."""

    def __init__(
        self, connection: Connection, nodes: Nodes, content: "Content", waiting: Waiting
    ) -> None:
        self._connection = connection
        self._nodes = nodes
        self._content = content
        self._waiting = waiting

    def serve(self, unique: int, nodeid: int, offset: int, size: int, flags: int) -> None:
        """Answer now if the bytes are here; else whoever brings them answers."""
        node = self._nodes.get(nodeid)
        if node is None:
            self._connection.refuse(unique, _READ, nodeid, Refusal(errno.ESTALE))
            return
        file = node.entry
        if not isinstance(file, File):
            self._connection.refuse(unique, _READ, file.path, Refusal(errno.EISDIR))
            return
        stop = min(offset + size, file.blob.size)
        if offset >= stop:
            self._connection.reply(unique)
            return
        (_DIRECT if flags & os.O_DIRECT else _CACHED).inc(stop - offset)
        self._read(file, Extent(offset, stop), unique)

    def _read(self, file: File, extent: Extent, unique: int) -> None:
        reply = _Reply(self._connection, self._content, self._waiting, file, extent, unique)
        try:
            ticket = self._content.read(file, extent, reply)
        except WeightstreamError as error:
            reply((), error)
            return
        except Exception as error:  # a bug: the reader must hear of it
            log.exception("unexpected, reading %s %s", file.path, extent)
            reply((), WeightstreamError(f"{file.path} {extent}: {error!r}"))
            return
        if not reply.is_done:
            reply.wait(ticket)


class _Reply:
    """The answer to one READ; called once, by whoever has the bytes or the error."""

    __slots__ = (
        "_connection", "_content", "_extent", "_file", "_ticket", "_unique", "_waiting",
        "is_done", "overdue_s",
    )  # fmt: skip

    def __init__(
        self, connection: Connection, content: "Content", waiting: Waiting, file: File,
        extent: Extent, unique: int,
    ) -> None:  # fmt: skip
        self._connection = connection
        self._content = content
        self._waiting = waiting
        self._file = file
        self._extent = extent
        self._unique = unique
        self._ticket: Ticket | None = None
        self.is_done = False
        self.overdue_s: float | None = None  # the content sees to it

    def __call__(self, views: Sequence[memoryview], error: WeightstreamError | None) -> None:
        if self.is_done:
            return
        self.is_done = True
        if error is None:
            self._connection.reply(self._unique, views)
        else:
            self._connection.refuse(self._unique, _READ, f"{self._file.path} {self._extent}", error)
        if self._ticket is not None:
            self._waiting.take(self._unique)

    def wait(self, ticket: "Ticket") -> None:
        """Be there for an interrupt, until the answer comes; it may have come meanwhile."""
        self._ticket = ticket
        self._waiting.add(self._unique, self)
        if self.is_done:
            self._waiting.take(self._unique)

    def interrupt(self) -> None:
        """Have the content answer that it was interrupted."""
        if self._ticket is not None:
            self._content.cancel(self._ticket)

    def expire(self) -> None:
        """Leave it to the content, which holds every read to its deadline."""
