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
from dataclasses import dataclass
from itertools import count, groupby
from typing import Literal

from weightstream import metrics
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, Flow, Priority, Wanted
from weightstream.cachefs.fetch.checks import check_stored
from weightstream.cachefs.fetch.slabs import Slab
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.files.fills import Fill, Fills
from weightstream.cachefs.files.held import Held, Scratch
from weightstream.cachefs.files.memory import Memory
from weightstream.cachefs.files.order import AccessOrder
from weightstream.cachefs.files.policy import shards_behind
from weightstream.cachefs.files.reads import Parked, Reply, Ticket, answer
from weightstream.cachefs.files.retained import Landed
from weightstream.cachefs.files.tree import File
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.errors import (
    LoadCancelled,
    ObjectChangedError,
    StoreError,
    UnavailableError,
    WeightstreamError,
)
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_AHEAD_CHUNKS = 4
"""How far to fetch ahead of a read where the file cannot be kept, and so is not filled."""

_TICK_S = 0.1
_IDLE_S = 10.0
_SEEN_COMPLETE_S = 1.0

State = Literal["absent", "partial", "filling", "complete"]


@dataclass(frozen=True, slots=True)
class ContentState:
    """How much of a file is here."""

    state: State
    present_bytes: int


class _Landing:
    """Bytes of one file land in the shared memory; see `Landing`."""

    exposes_memory = False

    def __init__(self, content: "Content", held: Held) -> None:
        self._content = content
        self._held = held

    def reserve(self, extent: Extent) -> Slab | None:
        return self._content.memory.reserve(self._held.blob, extent, self._held.chunk_bytes)

    def landed(self, extent: Extent) -> None:
        self._content.memory.landed(self._held.blob, extent, self._held.chunk_bytes)
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
        self._store = store if store is not None and store.writable else None
        self._engine = engine
        self._settings = settings
        self._siblings = siblings
        self.read_deadline_s = settings.deadline_s
        self.on_complete: Callable[[Blob], None] = lambda blob: None
        self.on_changed: Callable[[File], None] = lambda file: None
        """Called when the origin says that a file was replaced; from a thread of its own."""
        self.memory = Memory(engine.slabs)
        self._scratch = Scratch()
        self._lock = threading.Lock()
        self._helds: dict[str, Held] = {}
        self._orders: dict[str, AccessOrder] = {}
        self._parked = Parked()
        self._complete_until_s: dict[str, float] = {}
        self._demand_flows: set[Flow] = set()
        self._keeping_house = False
        self._closed = False
        keeps = self._store is not None and settings.write_back == "on" and settings.fill == "on"
        engine.write_back.judge = self._judge
        self._fills = (
            Fills(engine, source, self._store, self._landing, self._hold, self._fill_ended)
            if keeps and self._store is not None
            else None
        )

    # What drivers call: files

    def is_complete(self, blob: Blob) -> bool:
        """Say whether all of a blob is in the store, verified and sealed."""
        if self._store is None or not blob.size or not blob.version:
            return False
        held = self._helds.get(blob.id)
        if held is not None and held.stored is not None:
            return _is_complete(held.stored)
        now = time.monotonic()
        if self._complete_until_s.get(blob.id, 0.0) > now:
            return True
        stored = self._find(blob)
        if stored is None:
            return False
        with stored:
            complete = _is_complete(stored)
        if complete:
            self._complete_until_s[blob.id] = now + _SEEN_COMPLETE_S
        return complete

    def backing(self, blob: Blob) -> int | None:
        """Return a new read-only descriptor of a complete blob's data; the caller closes it."""
        stored = self._find(blob) if blob.version and blob.size else None
        if stored is None:
            self._complete_until_s.pop(blob.id, None)
            return None
        with stored:
            if not _is_complete(stored):
                self._complete_until_s.pop(blob.id, None)
                return None
            return stored.open_data()

    def opened(self, file: File) -> None:
        """Count an open; waits up to `open_wait_s` for a fill that is about to end."""
        self._count_open(file)
        fill = self._fills.of(file.blob.id) if self._fills else None
        wait_s = self._settings.open_wait_s
        if fill is not None and wait_s and fill.ends_within(wait_s):
            fill.done.wait(wait_s)

    def _count_open(self, file: File) -> None:
        while True:
            held = self._hold(file)
            with self._lock:
                if self._closed or self._helds.get(file.blob.id) is held:
                    held.opens += 1
                    return

    def released(self, file: File) -> None:
        """Count the end of an open."""
        with self._lock:
            held = self._helds.get(file.blob.id)
            if held is not None and held.opens:
                held.opens -= 1

    def state(self, blob: Blob) -> ContentState:
        """Return how much of a blob is here."""
        if not blob.size:
            return ContentState("complete", 0)
        if self.is_complete(blob):
            return ContentState("complete", blob.size)
        stored = self._find(blob)
        if stored is None:
            present = 0
        else:
            with stored:
                present = stored.present_bytes()
        if self._fills is not None and self._fills.of(blob.id) is not None:
            return ContentState("filling", present)
        return ContentState("partial" if present else "absent", present)

    def gauges(self) -> dict[str, int]:
        """Return what is under way; all 0 a few seconds after the last read."""
        return {
            "parked_reads": len(self._parked),
            "retained_bytes": self.memory.retained_bytes,
            "fills": len(self._fills) if self._fills is not None else 0,
            "demands": len(self._demand_flows),
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
            flows = list(self._demand_flows)
            everybody = self._parked.everybody()
        self._fail(everybody, LoadCancelled("the mount is being closed"))
        for flow in flows:
            flow.close()
        if self._fills is not None:
            self._fills.close(longest_s)
        with self._lock:
            helds, self._helds = list(self._helds.values()), {}
            orders, self._orders = list(self._orders.values()), {}
        for order in orders:
            order.save()
        for held in helds:
            held.close()
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
        with self._lock:
            alone = [i for i in alone if i not in held.demands]
            held.demands.update(alone)
        steps = count()
        for _, run in groupby(alone, key=lambda i: i - next(steps)):
            self._fetch(held, list(run))

    def _is_here(self, held: Held, i: int, part: Extent) -> bool:
        return self.memory.has(held.blob, part, held.chunk_bytes) or held.is_stored(i)

    def _fetch(self, held: Held, chunks: list[int]) -> None:
        """Start a flow over adjoining chunks, and what follows them if the file is not filled."""
        wanted = [self._wanted(held, chunks, Priority.DEMAND)]
        if self._fills is None:
            ahead = range(chunks[-1] + 1, min(chunks[-1] + 1 + _AHEAD_CHUNKS, held.n_chunks))
            with self._lock:
                coming = [i for i in ahead if i not in held.demands]
                held.demands.update(coming)
            coming = [i for i in coming if not self._is_here(held, i, held.chunk(i))]
            if coming:
                wanted.append(self._wanted(held, coming, Priority.PLANNED))
            chunks = [*chunks, *ahead]
        try:
            flow = self._engine.start(wanted, self._source, self._store)
        except WeightstreamError as error:
            self._demand_ended(held, chunks, error)
            return
        with self._lock:
            self._demand_flows.add(flow)
            closed = self._closed
        if closed:
            flow.close()
        threading.Thread(
            target=self._join, args=(held, chunks, flow), daemon=True, name="weightstream-demand"
        ).start()

    def _wanted(self, held: Held, chunks: Sequence[int], priority: Priority) -> Wanted:
        extents = tuple(held.chunk(i) for i in chunks)
        return Wanted(held.blob, self._landing(held), extents, priority)

    def _join(self, held: Held, chunks: list[int], flow: Flow) -> None:
        error: WeightstreamError | None = None
        try:
            with flow:
                flow.join()
        except WeightstreamError as failure:
            error = failure
        finally:
            with self._lock:
                self._demand_flows.discard(flow)
        self._demand_ended(held, chunks, error)

    def _demand_ended(
        self, held: Held, chunks: Sequence[int], error: WeightstreamError | None
    ) -> None:
        with self._lock:
            held.demands.difference_update(chunks)
            held.used_s = time.monotonic()
        span = Extent(held.chunk(min(chunks)).start, held.chunk(max(chunks)).stop)
        self._settle(held, span, error)

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
        with self._lock:
            held.used_s = time.monotonic()
        # Whatever ended the fill, a reader that waits gets a try of its own: its error is its own.
        self._settle(held, held.blob.whole(), None)
        held.order.save()
        if held.stored is not None and _is_complete(held.stored):
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
            self.memory.drop_blob(stored.blob)
        return error is None

    # Keeping

    def _hold(self, file: File) -> Held:
        """Return the file's entry, made when it is first needed."""
        held = self._helds.get(file.blob.id)
        if held is not None:
            return held
        stored = self._open(file.blob)
        with self._lock:
            order = self._orders.get(file.folder)
            if order is None:
                home = self._store.path if self._store is not None else None
                folder_uri = file.blob.uri.rsplit("/", 1)[0]
                order = self._orders[file.folder] = AccessOrder(home, folder_uri)
            made = Held(file, stored, self._settings.chunk_size, order)
            held = self._helds.setdefault(file.blob.id, made)
        if held is not made:
            made.close()
        self._keep_house()
        return held

    def _open(self, blob: Blob) -> StoredBlob | None:
        if self._store is None or not blob.version or not blob.size:
            return None
        try:
            if self._settings.write_back == "off":
                return self._store.find_blob(blob)
            return self._store.open_blob(blob)
        except StoreError as error:
            self._engine.write_back.pause(str(error))
            return None

    def _find(self, blob: Blob) -> StoredBlob | None:
        if self._store is None:
            return None
        try:
            return self._store.find_blob(blob)
        except StoreError as error:
            log.debug("not in the store: %s", error)
            return None

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
                waited = now - ticket.begun_s
                self._fail(
                    [ticket],
                    UnavailableError(
                        f"{ticket.file.blob.uri} {ticket.extent}: not here after {waited:.0f} s"
                    ),
                )
            if self._let_go(now):
                return

    def _let_go(self, now: float) -> bool:
        """Close files that nobody uses; say whether nothing is left to look after."""
        with self._lock:
            idle = [held for held in self._helds.values() if self._is_idle(held, now)]
            for held in idle:
                del self._helds[held.blob.id]
            left = bool(self._helds)
            if not left:
                orders, self._orders = list(self._orders.values()), {}
                self._keeping_house = False
        for held in idle:
            self.memory.drop_blob(held.blob)
            held.order.save()
            held.close()
        if left:
            return False
        for order in orders:
            order.save()
        self.memory.drop_all()
        return True

    def _is_idle(self, held: Held, now: float) -> bool:
        busy = held.opens or held.demands or held.flow or self._parked.of(held.blob.id)
        filling = self._fills is not None and self._fills.of(held.blob.id) is not None
        return not busy and not filling and now - held.used_s > _IDLE_S


def _is_complete(stored: StoredBlob) -> bool:
    try:
        return stored.complete
    except StoreError:
        return False  # closed meanwhile
