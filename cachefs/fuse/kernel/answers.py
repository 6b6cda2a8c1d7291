"""From a request to its answer, whether at once or by a thread that may wait.

Handlers answer from what is known. Where a folder must be listed first, its listing is asked for
and the handler runs again with the children in hand; opens, which look into the store, always go to
a thread of their own. Both wait in `Waiting`, so that a signal or the deadline can end them:
whoever takes a request out of it answers it.
"""

import errno
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from weightstream.cachefs.fuse.kernel import wire
from weightstream.cachefs.fuse.kernel.connection import Connection, Refusal
from weightstream.cachefs.fuse.kernel.names import Children, ChildrenOf, NotListed
from weightstream.cachefs.fuse.kernel.nodes import Nodes
from weightstream.cachefs.fuse.kernel.opens import Opens
from weightstream.cachefs.fuse.kernel.protocol import Op
from weightstream.cachefs.fuse.kernel.waiting import Deferred, Waiting
from weightstream.cachefs.fuse.kernel.wire import Parts, Request
from weightstream.cachefs.fuse.kernel.workers import Listings, Workers
from weightstream.errors import LoadCancelled, UnavailableError, WeightstreamError

if TYPE_CHECKING:
    from weightstream.cachefs.files.tree import Tree

log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Request, ChildrenOf], Parts | None]

_LISTERS = 8
_OPENERS = 32  # an open may wait `open_wait_s`

# ENOSYS has the kernel do what it can by itself, and mostly never ask again: there is nothing to
# flush, to sync or to seek.
_POINTLESS = (Op.FLUSH, Op.FSYNC, Op.FSYNCDIR, Op.BMAP, Op.IOCTL, Op.POLL, Op.LSEEK)


class Answers:
    """Answers requests other than READ. Thread-safe; never waits."""

    def __init__(
        self,
        connection: Connection,
        tree: "Tree",
        nodes: Nodes,
        opens: Opens,
        waiting: Waiting,
        deadline_s: float,
    ) -> None:
        self._connection = connection
        self._tree = tree
        self._nodes = nodes
        self._opens = opens
        self._waiting = waiting
        self._deadline_s = deadline_s
        self._listings = Listings(tree.children, Workers("list", _LISTERS))
        self._openers = Workers("open", _OPENERS)
        self._handlers: Mapping[int, Handler] = {}

    def use(self, handlers: Mapping[int, Handler]) -> None:
        """Answer by these."""
        self._handlers = handlers

    def listings(self) -> int:
        """Return how many folders are being listed."""
        return len(self._listings)

    def answer(self, request: Request) -> None:
        """Answer, or see to it that somebody will."""
        if request.opcode == Op.OPEN:
            self._open(request)
        elif request.opcode == Op.INTERRUPT:
            self._interrupt(request)
        elif (handler := self._handlers.get(request.opcode)) is not None:
            self._handle(request, handler, self._peek)
        else:
            if request.opcode not in _POINTLESS:
                log.debug("the kernel asks what is not known: %s", request.op)
            self._refuse(request, Refusal(errno.ENOSYS))

    def _handle(self, request: Request, handler: Handler, children_of: ChildrenOf) -> None:
        try:
            parts = handler(request, children_of)
        except NotListed as missing:
            self._list(request, handler, missing.path)
        except WeightstreamError as error:
            self._refuse(request, error)
        except Exception as error:  # a bug: whoever asked must hear of it
            log.exception("unexpected, answering %s", request.op)
            self._refuse(request, WeightstreamError(repr(error)))
        else:
            if parts is not None:
                self._connection.reply(request.unique, parts)

    def _refuse(self, request: Request, error: WeightstreamError) -> None:
        node = self._nodes.get(request.nodeid)
        what = request.nodeid if node is None else repr(node.entry.path)
        self._connection.refuse(request.unique, request.opcode, what, error)

    # ---- requests that wait

    def _peek(self, path: str) -> Children:
        children = self._tree.peek(path)
        if children is None:
            raise NotListed(path)
        return children

    def _list(self, request: Request, handler: Handler, path: str) -> None:
        """Answer when the folder is listed."""
        self._defer(request, path)

        def then(children: Children, error: WeightstreamError | None) -> None:
            if not self._waiting.take(request.unique):
                return
            if error is not None:
                self._refuse(request, error)
            else:
                self._handle(request, handler, lambda _: children)

        self._listings.ask(path, then)

    def _open(self, request: Request) -> None:
        """Answer when the store's files are open; they are opened by a thread that may wait."""
        try:
            self._opens.check(request)
        except WeightstreamError as error:
            self._refuse(request, error)
            return
        self._defer(request, "")
        self._openers.submit(lambda: self._finish_open(request))

    def _finish_open(self, request: Request) -> None:
        parts: Parts = []
        failure: WeightstreamError | None = None
        try:
            parts = self._opens.open(request)
        except WeightstreamError as error:
            failure = error
        except Exception as error:  # a bug: whoever asked must hear of it
            log.exception("unexpected, opening node %d", request.nodeid)
            failure = WeightstreamError(repr(error))
        mine = self._waiting.take(request.unique)
        if failure is None and mine and self._connection.reply(request.unique, parts):
            return
        self._opens.undo(request)
        if failure is not None and mine:
            self._refuse(request, failure)

    def _defer(self, request: Request, path: str) -> Deferred:
        limit_s = self._deadline_s
        late = f"no answer within {limit_s:g} s" + (f" for folder {path!r}" if path else "")
        return Deferred(
            self._waiting,
            request.unique,
            limit_s,
            lambda: self._refuse(request, LoadCancelled("interrupted")),
            lambda: self._refuse(request, UnavailableError(late)),
        )

    def _interrupt(self, request: Request) -> None:
        """End a request whose process got a signal; it gets no answer itself if it was found."""
        try:
            interrupted = wire.interrupted_of(request)
        except wire.WireError as error:
            self._refuse(request, error)
            return
        if not self._waiting.interrupt(interrupted):
            # Another thread is just at it, or has just answered: the kernel asks again, or knows.
            time.sleep(0.001)
            self._refuse(request, Refusal(errno.EAGAIN))
