"""The bytes of a mount's files: every read is answered from memory, the store or the origin.

A read takes its bytes where they are: in the memory in which they have just landed, or in the
store. If some are missing it is parked, the chunks that it lacks are asked for before everything
else, and whoever brings the last of its bytes answers it. No thread waits for a single read, so a
hundred page faults cost a hundred list entries, and a hung origin stops nobody but its own readers.

    read -> here? ------------------------------------------> answered on the caller's thread
              \\-> parked -> demanded (or boosted in a fill) -> landed -> answered
                        \\-> failed, cancelled or overdue ----> answered with the error

Parking and landing race without a lock between them: the ticket is parked first and then looks once
more, bytes land first and then look for tickets.

Lock: one for the tables of files and tickets, never held across I/O, a reply or an engine's call.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from weightstream import metrics
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine
from weightstream.cachefs.fetch.checks import check_stored, refute
from weightstream.cachefs.fetch.slabs import Slab
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.files.demands import Demands
from weightstream.cachefs.files.entries import File
from weightstream.cachefs.files.fills import Fill, Fills
from weightstream.cachefs.files.held import Held, Scratch
from weightstream.cachefs.files.memory import Memory
from weightstream.cachefs.files.policy import shards_behind
from weightstream.cachefs.files.reads import Parked, Reply, Ticket, answer
from weightstream.cachefs.files.retained import Landed
from weightstream.cachefs.files.shelf import ContentState, Shelf, is_complete
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.errors import (
    LoadCancelled,
    ObjectChangedError,
    UnavailableError,
    WeightstreamError,
)
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_TICK_S = 0.1


class _Landing:
    """Bytes of one file land in the shared memory; see `Landing`."""

    exposes_memory = False

    def __init__(self, content: "Content", held: Held) -> None:
        self._content = content
        self._held = held

    def reserve(self, extent: Extent) -> Slab | None:
        return self._content.memory.reserve(self._held.blob, extent, self._held.chunk_bytes, self)

    def landed(self, extent: Extent) -> None:
        self._content.memory.landed(self._held.blob, extent, self._held.chunk_bytes, self)
        self._content.have_landed(self._held, extent)


class Content:
    """The bytes of the files of one mount. Thread-safe."""

    def __init__(
        self,
        source: Source,
        store: Store | None,
        engine: Engine,
        settings: Settings,
        siblings: Callable[[File], Sequence[File]],
    ) -> None:
        self._source = source
        self._engine = engine
        self._open_wait_s = settings.open_wait_s
        self._siblings = siblings
        self.read_deadline_s = settings.deadline_s
        self.on_complete: Callable[[Blob], None] = lambda blob: None
        """Called when a file has become complete; from a thread that serves no read."""
        self.on_changed: Callable[[File], None] = lambda file: None
        """Called when the origin says that a file was replaced; likewise."""
        self.memory = Memory(engine.slabs)
        self._scratch = Scratch()
        self._lock = threading.Lock()
        self._parked = Parked()
        self._keeping_house = False
        self._closed = False
        self._shelf = Shelf(store, settings, engine.write_back)
        self._fills: Fills | None = None
        if store is not None and store.writable and settings.write_back == settings.fill == "on":
            self._fills = Fills(engine, source, store, self._landing, self._hold, self._fill_ended)
        self._demands = Demands(
            engine, source, store, self._landing, self._is_whole_here, self._settle,
            reads_ahead=self._fills is None,
        )  # fmt: skip
        engine.write_back.judge = self._judge

    # What drivers call: files

    def is_complete(self, blob: Blob) -> bool:
        """Say whether all of a blob is in the store, verified and sealed."""
        return self._shelf.is_complete(blob)

    def lies_in_memory(self, blob: Blob) -> bool:
        """Say whether most of a blob has landed and waits to be read, complete or not.

        A shard that was filled ahead of its reader: the disk has it by now, but the page cache has
        not, and from here it costs a copy. Not what a fill brought once more after a reader that
        was ahead of it: that one is done with it.
        """
        waits = 2 * self.memory.unread_bytes(blob) > blob.size
        return waits and 2 * self.memory.read_bytes(blob) < blob.size

    def backing(self, blob: Blob) -> int | None:
        """Return a new read-only descriptor of a complete blob's data; the caller closes it."""
        return self._shelf.backing(blob)

    def opened(self, file: File) -> None:
        """Count an open; waits up to `open_wait_s` for a fill that is about to end."""
        self._shelf.opened(file)
        fill = self._fills.of(file.blob.id) if self._fills is not None else None
        if fill is not None and self._open_wait_s and fill.ends_within(self._open_wait_s):
            fill.done.wait(self._open_wait_s)

    def released(self, file: File) -> None:
        """Count the end of an open."""
        self._shelf.released(file)

    def state(self, blob: Blob) -> ContentState:
        """Return how much of a blob is here."""
        filling = self._fills is not None and self._fills.of(blob.id) is not None
        return self._shelf.state(blob, filling)

    def gauges(self) -> dict[str, int]:
        """Return what is under way; all 0 a few seconds after the last read."""
        return {
            "parked_reads": len(self._parked),
            "retained_bytes": self.memory.retained_bytes,
            "fills": len(self._fills) if self._fills is not None else 0,
            "demands": len(self._demands),
            "budget_used_bytes": self._engine.budget.used_bytes,
        }

    # What drivers call: bytes

    def read(self, file: File, extent: Extent, reply: Reply) -> Ticket:
        """Answer with the bytes of `extent`, now or later; see the module's docstring."""
        extent = Extent(min(extent.start, file.blob.size), min(extent.stop, file.blob.size))
        ticket = Ticket(file, extent, reply, time.monotonic() + self.read_deadline_s)
        if self._closed:
            ticket.answered = True
            answer(ticket, (), LoadCancelled(f"{file.blob.uri}: the mount is being closed"))
        elif not len(extent):
            ticket.answered = True
            answer(ticket, (), None)
        else:
            self._read(ticket)
        return ticket

    def read_now(self, file: File, extent: Extent) -> bytes:
        """Return the bytes of `extent`; raises what went wrong. For drivers with a thread each."""
        done = threading.Event()
        got: list[bytes] = []
        failed: list[WeightstreamError] = []

        def reply(views: Sequence[memoryview], error: WeightstreamError | None) -> None:
            if error is not None:
                failed.append(error)
            else:
                got.append(b"".join(views))
            done.set()

        self.read(file, extent, reply)
        done.wait()  # bounded: every ticket has a deadline
        if failed:
            raise failed[0]
        return got[0]

    def cancel(self, ticket: Ticket) -> None:
        """Answer a ticket that still waits with `LoadCancelled`."""
        self._fail([ticket], LoadCancelled(f"{ticket.file.blob.uri}: the read was interrupted"))

    def close(self, longest_s: float = 2.0) -> None:
        """Answer whoever waits, end all fetching; returns within about `longest_s`."""
        with self._lock:
            self._closed = True
            everybody = self._parked.everybody()
        self._fail(everybody, LoadCancelled("the mount is being closed"))
        self._demands.close()
        if self._fills is not None:
            self._fills.close(longest_s)
        self._close(self._shelf.clear())
        self.memory.drop_all()

    # Reading

    def _read(self, ticket: Ticket) -> None:
        held = self._hold(ticket.file)
        loading = held.touch(ticket.extent)
        if not self._serve(ticket, held):
            self._park(ticket)
            if not self._serve(ticket, held):
                self._demand(held, ticket.extent)
        if loading:
            self._fill(held)

    def _serve(self, ticket: Ticket, held: Held) -> bool:
        """Answer if the bytes are here; False when some are missing."""
        taken = self._gather(held, ticket.extent)
        if taken is None:
            return False
        views, landed = taken
        with self._lock:
            mine = self._parked.take([ticket])
        if mine:
            answer(ticket, views, None)
        for one, read_bytes in landed:
            self.memory.release(one, read_bytes if mine else 0)
        return True

    def _gather(
        self, held: Held, extent: Extent
    ) -> tuple[list[memoryview], list[tuple[Landed, int]]] | None:
        """Return views of all bytes, and the held memory of some; None: not all is here."""
        views: list[memoryview] = []
        landed: list[tuple[Landed, int]] = []
        scratch: memoryview | None = None
        for i, part in held.parts(extent):
            one = self.memory.hold(held.blob, part, held.chunk_bytes)
            if one is not None:
                views.append(one.view(part))
                landed.append((one, len(part)))
                continue
            if held.is_stored(i):
                scratch = scratch or self._scratch.take(len(extent))
                into = scratch[part.start - extent.start : part.stop - extent.start]
                if held.read_stored(i, part, into):
                    views.append(into)
                    continue
            for other, _ in landed:
                self.memory.release(other, 0)
            return None
        return views, landed

    def _park(self, ticket: Ticket) -> None:
        with self._lock:
            self._parked.add(ticket)
            metrics.PARKED_READS.set(len(self._parked))
        self._keep_house()

    def _demand(self, held: Held, extent: Extent) -> None:
        """Have the chunks that a parked read lacks fetched before everything else."""
        missing = [i for i, part in held.parts(extent) if not self._is_here(held, i, part)]
        flow = held.flow
        alone = []
        for i in missing:
            if flow is not None and flow.brings(held.blob, held.chunk(i)):
                flow.boost(held.blob, held.chunk(i))
            else:
                alone.append(i)
        self._demands.fetch(held, alone)

    def _is_here(self, held: Held, i: int, part: Extent) -> bool:
        return self.memory.has(held.blob, part, held.chunk_bytes) or held.is_stored(i)

    def _is_whole_here(self, held: Held, i: int) -> bool:
        return self._is_here(held, i, held.chunk(i))

    def _landing(self, held: Held) -> _Landing:
        return _Landing(self, held)

    # Answering later

    def have_landed(self, held: Held, extent: Extent) -> None:
        """Answer whom these bytes were the last for; on the thread that brought them."""
        if not len(self._parked):
            return
        with self._lock:
            waiting = self._parked.of(held.blob.id, extent)
        for ticket in waiting:
            if self._is_ready(held, ticket.extent):
                self._serve(ticket, held)

    def _is_ready(self, held: Held, extent: Extent) -> bool:
        return all(self._is_here(held, i, part) for i, part in held.parts(extent))

    def _settle(self, held: Held, extent: Extent, error: WeightstreamError | None) -> None:
        """After a flow: who waits for what it should have brought gets it, or the error."""
        with self._lock:
            waiting = self._parked.of(held.blob.id, extent)
        for ticket in waiting:
            if self._serve(ticket, held):
                continue
            if error is not None:
                self._fail([ticket], error)
            else:  # it came and went again, for want of memory
                self._demand(held, ticket.extent)
        if isinstance(error, ObjectChangedError):
            self.on_changed(held.file)

    def _fail(self, tickets: Sequence[Ticket], error: WeightstreamError) -> None:
        with self._lock:
            taken = self._parked.take(tickets)
            metrics.PARKED_READS.set(len(self._parked))
        for ticket in taken:
            answer(ticket, (), error)

    # Filling

    def _fill(self, held: Held) -> None:
        if self._fills is None or not self._fills.is_wanted(held):
            return
        self._fills.begin(held, self._behind(held))

    def _behind(self, held: Held) -> list[File]:
        try:
            siblings = {file.name: file for file in self._siblings(held.file)}
        except WeightstreamError as error:
            log.debug("nothing is filled behind %s: %s", held.file.path, error)
            return []
        names = shards_behind(held.file.name, list(siblings), held.order.names())
        return [siblings[name] for name in names if not self.is_complete(siblings[name].blob)]

    def _fill_ended(self, fill: Fill) -> None:
        held = fill.held
        held.rest()
        # Whatever ended the fill, a reader that waits gets a try of its own: its error is its own.
        self._settle(held, held.blob.whole(), None)
        held.order.save()
        if held.stored is not None and is_complete(held.stored):
            self.on_complete(held.blob)

    def _judge(self, stored: StoredBlob) -> bool:
        """Say whether a file that came in parts is what the origin has; whoever read it is told."""
        try:
            error: WeightstreamError | None = check_stored(self._source, stored)
        except WeightstreamError as failure:
            log.debug("not compared with the origin's checksum: %s", failure)
            return True
        if error is not None:
            log.error("%s", error)
            refute(self._source, stored.blob)
            self.memory.drop_blob(stored.blob)
        return error is None

    # Keeping

    def _hold(self, file: File) -> Held:
        held = self._shelf.hold(file)
        self._keep_house()
        return held

    def _keep_house(self) -> None:
        with self._lock:
            if self._keeping_house or self._closed:
                return
            self._keeping_house = True
        threading.Thread(target=self._house, daemon=True, name="weightstream-reads").start()

    def _house(self) -> None:
        """Hold reads to their deadline and let go of what is idle; ends when nothing is left."""
        while True:
            time.sleep(_TICK_S)
            now = time.monotonic()
            with self._lock:
                overdue = self._parked.overdue(now)
            for ticket in overdue:
                self._fail([ticket], _overdue(ticket, now))
            self._close(self._shelf.let_go(now, self._is_busy))
            with self._lock:
                if not len(self._shelf) and not len(self._parked):
                    self._keeping_house = False
                    break
        self.memory.drop_all()

    def _is_busy(self, held: Held) -> bool:
        filling = self._fills is not None and self._fills.of(held.blob.id) is not None
        with self._lock:
            return filling or bool(held.demands or self._parked.of(held.blob.id))

    def _close(self, helds: Sequence[Held]) -> None:
        for held in helds:
            self.memory.drop_blob(held.blob)
            held.order.save()
            held.close()


def _overdue(ticket: Ticket, now: float) -> UnavailableError:
    waited_s = now - ticket.begun_s
    return UnavailableError(
        f"{ticket.file.blob.uri} {ticket.extent}: not here after {waited_s:.0f} s"
    )
