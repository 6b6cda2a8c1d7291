"""Which piece is next, and where it comes from: the store, the source, or somebody else's fetch.

Stages of a piece: PENDING -> RUNNING -> LANDED, with ELSEWHERE between for a chunk that another
flow or process is fetching (its lock is taken): that piece is looked at again every few
milliseconds and read from the store once it is there. A lock whose holder dies is free at once; a
holder that makes no progress is waited for at most `share_wait_s`.

`next_run` and `put_back` are called by one thread at a time (the flow's claiming lock), because
they touch the store's locks; the queues have a lock of their own for `boost`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.fetch.landing import Priority
from weightstream.cachefs.fetch.piece import Part, Piece, Stage
from weightstream.cachefs.store import ChunkState
from weightstream.errors import StoreError

log = logging.getLogger(__name__)

POLL_S = 0.005


class _Way(Enum):
    STORE = auto()
    SOURCE = auto()
    ELSEWHERE = auto()


@dataclass(frozen=True, slots=True)
class Run:
    """Pieces that adjoin and come from one place in one request; their chunks are locked."""

    part: Part
    pieces: list[Piece]
    from_store: bool

    @property
    def extent(self) -> Extent:
        """Return the bytes of the run."""
        return Extent(self.pieces[0].extent.start, self.pieces[-1].extent.stop)


class Claims:
    """The queues of one flow."""

    def __init__(
        self, parts: Sequence[Part], range_bytes: int, share_wait_s: float, brings: bool = False
    ) -> None:
        """`brings` is that of the source: see `Plans`."""
        self._range_bytes = range_bytes
        self._brings = brings
        self._share_wait_s = share_wait_s
        self._lock = threading.Lock()
        self._pending: dict[Priority, deque[Piece]] = {p: deque() for p in Priority}
        for part in parts:
            self._pending[part.priority].extend(part.planned)
        self._elsewhere: list[Piece] = []
        self._look_again_s = 0.0

    @property
    def waits_for_others(self) -> bool:
        """Say that a piece is elsewhere: look again soon."""
        return bool(self._elsewhere)

    @property
    def urgency(self) -> Priority:
        """Return the priority of what would be claimed next."""
        return next((p for p, queue in self._pending.items() if queue), Priority.BACKGROUND)

    def boost(self, pieces: Iterable[Piece]) -> None:
        """Put these before everything else. Old queue entries are passed over when they come."""
        with self._lock:
            for piece in pieces:
                piece.priority = Priority.DEMAND
                self._pending[Priority.DEMAND].append(piece)

    def next_run(self, for_reader: bool = False) -> Run | None:
        """Return what to fetch next, or None when nothing can be fetched now; `for_reader`: of what
        a reader waits for."""
        now = time.monotonic()
        if self._elsewhere and now >= self._look_again_s:
            self._look_elsewhere(now)
        while (piece := self._pop(for_reader)) is not None:
            way = self._way(piece)
            if way is _Way.STORE:
                return Run(piece.part, [piece], from_store=True)
            if way is _Way.SOURCE:
                return Run(piece.part, self._extend(piece), from_store=False)
            piece.stage, piece.elsewhere_since = Stage.ELSEWHERE, now
            self._elsewhere.append(piece)
        return None

    def put_back(self, pieces: Sequence[Piece]) -> None:
        """Make claimed pieces pending again, before all others of their priority."""
        with self._lock:
            for piece in reversed(pieces):
                unlock(piece)
                piece.stage = Stage.PENDING
                self._pending[piece.priority].appendleft(piece)

    def _pop(self, for_reader: bool) -> Piece | None:
        with self._lock:
            for priority, queue in self._pending.items():
                while queue and (priority is Priority.DEMAND or not for_reader):
                    piece = queue.popleft()
                    if piece.stage is Stage.PENDING:
                        return piece
        return None

    def _way(self, piece: Piece) -> _Way:
        """Decide where a piece comes from; a load goes on without a store that fails."""
        try:
            return self._find_way(piece)
        except StoreError as error:
            log.debug("fetching %s without the store: %s", piece.extent, error)
            unlock(piece)
            piece.alone = True
            return _Way.SOURCE

    def _find_way(self, piece: Piece) -> _Way:
        """Look at the store; locks the chunk when it is to be fetched and kept."""
        part, stored = piece.part, piece.part.stored
        if stored is None or piece.alone:
            return _Way.SOURCE
        if stored.state(piece.chunk) is not ChunkState.EMPTY:
            return _Way.STORE
        if not (part.keep and piece.whole):
            return _Way.SOURCE
        if not stored.try_lock(piece.chunk):
            return _Way.ELSEWHERE
        piece.locked = True
        if stored.state(piece.chunk) is not ChunkState.EMPTY:
            unlock(piece)  # it came between our look and our lock
            return _Way.STORE
        return _Way.SOURCE

    def _extend(self, piece: Piece) -> list[Piece]:
        """Return `piece` and the pending pieces right behind it that one request can bring.

        None for a source that brings them by itself: it is asked as often, and a reader who comes
        to wait for a piece in the midst of a run waited for those before it (0.3 to 0.7 s).
        """
        pieces, start = [piece], piece.extent.start
        if self._brings:
            return pieces
        stop = start + self._range_bytes
        for other in piece.part.overlapping(Extent(start, stop))[1:]:
            fits = other.extent.stop <= stop and other.extent.start == pieces[-1].extent.stop
            if piece.alone or not fits or other.stage is not Stage.PENDING:
                break
            if self._way(other) is not _Way.SOURCE:
                break
            pieces.append(other)
        return pieces

    def _look_elsewhere(self, now: float) -> None:
        """Bring back the pieces whose chunk has come, whose lock is free or whose time is up."""
        back = [piece for piece in self._elsewhere if self._comes_back(piece, now)]
        gone = set(back)
        self._elsewhere = [piece for piece in self._elsewhere if piece not in gone]
        if any(not piece.alone for piece in back):
            for piece in self._elsewhere:
                piece.elsewhere_since = now  # the others make progress: patience begins anew
        self.put_back(back)
        # A model of thousands of chunks elsewhere takes longer to look at than a poll: a tenth of
        # the time may go into it.
        done = time.monotonic()
        self._look_again_s = done + max(POLL_S, 9 * (done - now))

    def _comes_back(self, piece: Piece, now: float) -> bool:
        stored = piece.part.stored
        assert stored is not None
        try:
            if stored.state(piece.chunk) is not ChunkState.EMPTY:
                return True
            if stored.try_lock(piece.chunk):
                stored.unlock(piece.chunk)
                return True
        except StoreError:
            return True  # `_way` says so
        piece.alone = now - piece.elsewhere_since > self._share_wait_s
        return piece.alone


def unlock(piece: Piece) -> None:
    """Release the chunk's lock if the piece holds it."""
    if piece.locked and piece.part.stored is not None:
        piece.locked = False
        try:
            piece.part.stored.unlock(piece.chunk)
        except StoreError as error:  # closed: its locks went with it
            log.debug("cannot unlock %s: %s", piece.extent, error)
