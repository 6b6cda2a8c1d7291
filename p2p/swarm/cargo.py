"""One blob in the swarm of one node: what is here, what is passed on, who waits for what.

A piece goes out as soon as this node's gate has read it (`offer`), one comes when libtorrent says
so. A chunk all of whose pieces came is *ready*; it *is here* once the checker has found it right.
What the store has of the blob already is copied into the swarm (`supply`).

`_lock` guards the tables and is never held across I/O.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightstream import metrics
from weightstream.errors import StoreError
from weightstream.p2p.exchange.carrier import ArrivedError
from weightstream.p2p.exchange.flights import Flight, FlightState
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.swarm.keeper import Keeper
from weightstream.p2p.swarm.policy import Rate, dawdlers, is_impatient, is_stalled
from weightstream.p2p.swarm.torrent import Shape

log = logging.getLogger(__name__)

_MANY = 3
MOST_SUPPLIED_BYTES = 256 << 20
"""So much of the store is copied into a swarm: the chunks that somebody read before the load."""


class Cargo:
    """Satisfies `Carried`. Thread-safe."""

    def __init__(
        self,
        relay: Relay,
        shape: Shape,
        path: Path,
        writes: bool,
        description: bytes,
        keeper: Keeper,
    ) -> None:
        """`path`: a file of its own; the store's, when it only gives (`writes` is false)."""
        self.relay = relay
        self.shape = shape
        self.path = path
        self.met: dict[str, int] = {}
        """By node, on which port it takes part."""
        self.senders: dict[int, Mapping[str, Sequence[int]]] = {}
        """By piece of chunks that are not here yet: by host, the blocks that it sent."""
        self.ready: dict[int, float] = {}
        """Chunks to be checked, and since when."""
        self.era = 0
        self._name = relay.blob.id
        self._writes = writes
        self._description = description
        self._keeper = keeper
        self._lock = threading.Lock()
        self._got = bytearray(shape.n_pieces)
        self._offered = bytearray(shape.n_pieces)
        self._digests: dict[int, bytes] = {}
        self._mended: set[int] = set()
        self._wanted: set[int] = set()
        self._parked: dict[int, tuple[Flight, float]] = {}
        self._live: frozenset[str] = frozenset()
        self._moved = (0, 0)
        self._moved_s = self._told_s = time.monotonic()
        self._rate = Rate()
        self._given_up: list[int] = []
        self._failed = False
        self._is_removed = False
        self.is_closed = False
        self._is_supplied = True
        self.add()

    # What the exchange asks

    @property
    def is_up(self) -> bool:
        """See `Carried`."""
        return self._writes and self._keeper.is_up and not self.is_over

    @property
    def is_over(self) -> bool:
        """Say that it does not take part any more."""
        return self.is_closed or self._failed

    def carries(self, chunk: int) -> bool:
        """See `Carried`."""
        if not self.is_up or not self._live or chunk not in self._wanted:
            return False
        return not self._live.isdisjoint(self.relay.suppliers(chunk))

    def want(self, chunks: Iterable[int]) -> None:
        """See `Carried`."""
        new = [i for i in chunks if i not in self._wanted and not self.relay.is_stored(i)]
        with self._lock:
            self._wanted.update(new)
            self._moved_s, self._rate = time.monotonic(), Rate()
        self._tell_wanted(new, True)
        self.look()

    def rest(self) -> None:
        """See `Carried`."""
        with self._lock:
            gone = [i for i in self._wanted if i not in self._digests]
            self._wanted.difference_update(gone)
        self._tell_wanted(gone, False)

    def park(self, flight: Flight) -> None:
        """See `Carried`."""
        flight.is_parked = True
        with self._lock:
            if not self.is_closed:
                self._parked[flight.chunk] = flight, time.monotonic()
                return
        self.relay.start(flight)

    def offer(self, flight: Flight) -> None:
        """See `Carried`: what the origin sent is passed on at once, what a peer sent once it was
        checked."""
        if not self._writes or not self._keeper.is_up:
            return
        landed = flight.state is FlightState.LANDED
        known = len(flight.extent) if landed else flight.position
        for i in self.shape.pieces(flight.chunk):
            piece = self.shape.piece(i)
            if piece.stop - flight.extent.start > known:
                return
            if self._is_to_be_sent(i):
                self._send(flight, i, piece.start - flight.extent.start, len(piece))

    def meet(self, node: str, port: int) -> None:
        """See `Carried`."""
        self.met[node] = port
        self.look()

    def has(self, chunk: int) -> bool:
        """See `Carried`."""
        return chunk in self._digests

    def digest(self, chunk: int) -> bytes:
        """See `Carried`."""
        return self._digests[chunk]

    def stands_by(self, chunk: int) -> bool:
        """See `Carried`."""
        if not self._writes:
            return self.relay.is_stored(chunk)
        return chunk in self._digests and chunk not in self._mended

    def read_into(self, chunk: int, offset: int, into: memoryview) -> bool:
        """See `Carried`."""
        if not self.has(chunk):
            return False
        at = chunk * self.shape.chunk_size + offset
        try:
            with open(self.path, "rb", buffering=0) as file:
                return _read_fully(file.fileno(), into, at)
        except OSError as error:  # the swarm was left meanwhile, or the disk fails
            log.debug("not read from the swarm's file: %s", error)
            return False

    def open_data(self) -> int:
        """See `Carried`."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"cannot open {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """See `Carried`."""
        with self._lock:
            self.is_closed = True
        self._keeper.tell({"op": "remove", "name": self._name})
        self._release()
        if self._writes:
            self.path.unlink(missing_ok=True)

    # What the swarm says

    def add(self) -> None:
        """Tell the process of it, a new one of what is here already; then comes `supply`."""
        if self.is_over:
            return
        with self._lock:
            for piece in range(self.shape.n_pieces):
                here = not self._writes or self.shape.chunk(piece) in self._digests
                self._got[piece] = self._offered[piece] = here
            have = "".join("1" if got else "0" for got in self._got)
            self.ready.clear()
            self._is_supplied = not self._writes
            self._moved_s = self._told_s = time.monotonic()
            self._moved, self._rate = (0, 0), Rate()
        about = {"path": str(self.path), "writes": self._writes, "have": have}
        self._keeper.tell({"op": "add", "name": self._name, **about}, self._description)
        self._tell_wanted(sorted(self._wanted), True)

    def supply(self) -> None:
        """Copy what is here already, in memory or in the store, into a swarm that lacks it."""
        if self._is_supplied:
            return
        self._is_supplied = True
        for flight in self.relay.flights():
            self.offer(flight)
        for chunk in self.relay.stored_chunks()[: MOST_SUPPLIED_BYTES // self.shape.chunk_size]:
            for i in self.shape.pieces(chunk):
                if self._is_to_be_sent(i):
                    self._send_stored(chunk, i)

    def connect(self, host: str, port: int) -> None:
        """Connect to a member; the process does it again when the connection is lost."""
        self._keeper.tell({"op": "connect", "name": self._name, "host": host, "port": port})

    def pieces(self, finished: Iterable[Mapping[str, Any]]) -> bool:
        """Hear which pieces are in the file; say whether a chunk became ready."""
        with self._lock:
            before = len(self.ready)
            for one in finished:
                piece = int(one["piece"])
                chunk = self.shape.chunk(piece)
                if self._got[piece] or chunk in self._digests:
                    continue
                self._got[piece] = 1
                self.senders[piece] = one["senders"]
                if all(self._got[i] for i in self.shape.pieces(chunk)):
                    self.ready[chunk] = time.monotonic()
            return len(self.ready) > before

    def moved(self, down_bytes: int, up_bytes: int) -> None:
        """Hear how many bytes came and went so far."""
        came, went = down_bytes - self._moved[0], up_bytes - self._moved[1]
        now_s = time.monotonic()
        self._rate = self._rate.after(came, now_s - self._told_s)
        self._told_s = now_s
        if self._rate.keeps_up:
            self._moved_s = now_s
        if came:
            metrics.PEER_BYTES.labels("swarm_received").inc(came)
        if went:
            metrics.PEER_BYTES.labels("swarm_sent").inc(went)
        if came or went:
            self.relay.used_s = now_s
        self._moved = down_bytes, up_bytes

    def fail(self, why: str) -> None:
        """Hear why it cannot take part any more: the disk is full, say."""
        if self.is_over:
            return
        level = logging.WARNING if self._writes else logging.INFO
        log.log(level, "%s is not in the swarm any more: %s", self.relay.blob.uri, why)
        self._failed = True

    # What the checker says

    def accept(self, chunk: int, digest: bytes, mended: bool) -> None:
        """Take a chunk for right; `mended` when wrong bytes of it may have been passed on."""
        with self._lock:
            self._digests[chunk] = digest
            self._mended |= {chunk} if mended else set()
            self.ready.pop(chunk, None)
            for piece in self.shape.pieces(chunk):
                self.senders.pop(piece, None)
            parked = self._parked.pop(chunk, None)
        if parked is not None:
            _arrive(parked[0])

    # Now and then

    def look(self) -> None:
        """See who of the swarm is alive, and have brought otherwise what it does not bring."""
        now_s = time.monotonic()
        if not self._writes and not self.is_over and self.relay.stored_path() is None:
            self.fail("the store let go of some of it")
        if self._failed and not self._is_removed:
            self._is_removed = True
            self._keeper.tell({"op": "remove", "name": self._name})
        stalled = is_stalled(now_s - self._moved_s)
        if stalled and self._live:
            self._pass_over(i for i in sorted(self._wanted) if not self.relay.is_here(i))
        alive = frozenset(self.relay.alive())
        live = (
            frozenset[str]() if stalled or not self.is_up else alive.intersection(tuple(self.met))
        )
        if live != self._live:
            self._live = live
            self.era += 1
        with self._lock:
            parked = list(self._parked.items())
        for chunk, (flight, since_s) in parked:
            if chunk in self._digests:
                _arrive(flight)
            elif self.carries(chunk) and not is_impatient(now_s - since_s):
                continue
            elif flight.is_parked:
                if is_impatient(now_s - since_s):
                    self._give_up(chunk)
                self.relay.start(flight)
            with self._lock:
                if self._parked.get(chunk, (None,))[0] is flight:
                    del self._parked[chunk]

    def _give_up(self, chunk: int) -> None:
        """Hear that a reader waited in vain: pieces come in any order, but if they are always the
        same home's it is slow."""
        self._given_up.append(chunk)
        if len(self._given_up) >= _MANY:
            self._pass_over(self._given_up)

    def _pass_over(self, chunks: Iterable[int]) -> None:
        """Take the few whose chunks are waited for to be slow, if they are few."""
        readers = [reader for i in chunks if (reader := self.relay.reader(i)) in self.met]
        for node in dawdlers(readers, len(self.relay.crowd.nodes)):
            log.info("peer %s is waited for in the swarm: it is slow", node)
            self.relay.dawdle(node)

    def _release(self) -> None:
        with self._lock:
            parked = list(self._parked.values())
            self._parked.clear()
        for flight, _ in parked:
            if flight.is_parked:
                self.relay.start(flight)

    def _tell_wanted(self, chunks: Sequence[int], wanted: bool) -> None:
        pieces = (self.shape.pieces(chunk) for chunk in chunks)
        runs = [(run.start, run.stop) for run in pieces]
        if runs:
            told = {"op": "want", "name": self._name, "runs": runs, "wanted": wanted}
            self._keeper.tell(told)

    def _is_to_be_sent(self, piece: int) -> bool:
        with self._lock:
            if self._offered[piece] or self._got[piece]:
                return False
            self._offered[piece] = 1
            return True

    def _send(self, flight: Flight, piece: int, at: int, count: int) -> None:
        slab = flight.hold()
        if slab is None:
            return
        try:
            told = {"op": "piece", "name": self._name, "piece": piece}
            self._keeper.tell(told, slab.view[at : at + count])
        finally:
            slab.release()

    def _send_stored(self, chunk: int, piece: int) -> None:
        extent = self.shape.piece(piece)
        data = memoryview(bytearray(len(extent)))
        if self.relay.read_stored(chunk, extent.start - self.relay.chunk(chunk).start, data):
            self._keeper.tell({"op": "piece", "name": self._name, "piece": piece}, data)


def _read_fully(descriptor: int, into: memoryview, at: int) -> bool:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], at + done)
        if not count:
            return False
        done += count
    return True


def _arrive(flight: Flight) -> None:
    if flight.claim():
        flight.fail(ArrivedError(f"{flight.blob.uri} {flight.extent} is here"))
