"""The rest of a chunk, shared: some blocks from its home, the others from those who asked for them.

    home ── block 0 ──> A ── block 0 ──> B, C        each block leaves the home once
         ── block 1 ──> B ── block 1 ──> A, C
         ── block 2 ──> C ── block 2 ──> A, B

What a receiver does not give, each of the others asks the home for. What came is passed on
unchecked, as always; the home says at the end what the whole chunk is.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from weightstream import metrics
from weightstream.errors import WeightstreamError
from weightstream.p2p.exchange.client import ChunkName, PeerClient, PeerError
from weightstream.p2p.exchange.flights import Flight, Scatter
from weightstream.p2p.exchange.parts import Neighbours
from weightstream.p2p.exchange.sinks import HurryError, SlowError, WrongError
from weightstream.p2p.members import Member
from weightstream.p2p.schedule import BLOCK_BYTES, block_giver

log = logging.getLogger(__name__)

_PATIENCE_S = 2.0
"""A block that does not come from a receiver in so long is asked of the home, as are all that were
to come from it."""
_HOME_PATIENCE_S = 10.0
"""The home may be slow: its uplink is what all of this is about."""


class Gathering:
    """One chunk on its way in blocks; `bring` is called once, by whoever brings the chunk."""

    def __init__(
        self,
        flight: Flight,
        view: memoryview,
        name: ChunkName,
        scatter: Scatter,
        me: str,
        neighbours: Neighbours,
    ) -> None:
        self._flight = flight
        self._view = view
        self._name = name
        self._scatter = scatter
        self._neighbours = neighbours
        self._lock = threading.Lock()
        self._is_broken_off = False
        self._wanted: dict[str, deque[int]] = {scatter.home: deque()}
        """By who is asked first: the blocks that nobody was asked for yet."""
        for block in range(flight.position // BLOCK_BYTES, -(-len(view) // BLOCK_BYTES)):
            giver = block_giver(scatter.receivers, block)
            self._wanted.setdefault(scatter.home if giver == me else giver, deque()).append(block)

    def bring(self, client: PeerClient, alive: Mapping[str, Member]) -> None:
        """Fill the rest of the chunk. Raises `PeerError` when its home does not give what nobody
        else gives, and `HurryError` when a reader has come to wait for it."""
        home = alive.get(self._scatter.home)
        if home is None:
            raise PeerError(f"peer {self._scatter.home} is gone")
        slow = self._neighbours.slow()
        givers = [alive[node] for node in self._wanted if node in alive and node not in slow]
        helpers: list[threading.Thread] = []
        try:
            for giver in givers:
                if giver is not home:
                    helpers.append(self._help(client, giver))
            self._from_home(client, home)
        except BaseException:
            self._is_broken_off = True
            raise
        finally:
            for helper in helpers:  # they write into the chunk's memory
                helper.join()
        self._from_home(client, home)  # what a receiver did not give meanwhile
        if self._flight.position < len(self._view):
            raise PeerError("some of it is missing")

    def _help(self, client: PeerClient, giver: Member) -> threading.Thread:
        helper = threading.Thread(
            target=self._from_receiver, args=(client, giver), daemon=True,
            name="weightstream-gather",
        )  # fmt: skip
        helper.start()
        return helper

    def raise_if_over(self, giver: str) -> None:
        """Raise what ends a block that nobody wants any more, at least not in this way."""
        if self._flight.asks_again and not self._flight.urgent:
            raise HurryError("a reader waits for it")
        if self._is_broken_off:
            raise PeerError("the home of the chunk gives no more of it")
        if self._neighbours.is_banned(giver) or self._neighbours.is_banned(self._scatter.home):
            raise WrongError(f"peer {giver} or its home gave wrong bytes of another chunk")
        self._flight.raise_if_over()

    def _from_receiver(self, client: PeerClient, member: Member) -> None:
        while (block := self._next(member.node)) is not None:
            try:
                self._fetch(client, member, block, _PATIENCE_S)
            except WeightstreamError as error:
                log.debug("%s; its home is asked for block %d", error, block)
                with self._lock:
                    self._wanted[member.node].append(block)
                return

    def _from_home(self, client: PeerClient, home: Member) -> None:
        """Bring what is this node's to give, then what nobody else was asked for yet, the last
        first: others come to those in order."""
        while (block := self._next(home.node)) is not None or (block := self._last()) is not None:
            self._fetch(client, home, block, _HOME_PATIENCE_S)

    def _next(self, giver: str) -> int | None:
        with self._lock:
            wanted = self._wanted[giver]
            return wanted.popleft() if wanted and not self._is_broken_off else None

    def _last(self) -> int | None:
        with self._lock:
            wanted = max(self._wanted.values(), key=len)
            return wanted.pop() if wanted else None

    def _fetch(self, client: PeerClient, member: Member, block: int, patience_s: float) -> None:
        flight = self._flight
        start = max(block * BLOCK_BYTES, flight.position)
        into = self._view[start : (block + 1) * BLOCK_BYTES]
        sink = _BlockSink(self, member.node, patience_s)
        sink.advance(0)
        client.fetch_part(member, self._name, start, into, sink)
        flight.put_block(block)
        metrics.PEER_BYTES.labels("received").inc(len(into))


class _BlockSink:
    """A block on its way: broken off when it is not wanted any more, or does not come in time."""

    def __init__(self, gathering: Gathering, giver: str, patience_s: float) -> None:
        self._gathering = gathering
        self._giver = giver
        self._until_s = time.monotonic() + patience_s

    is_hurried = False
    """Blocks come from several peers: what comes slowly is asked for again, as all of a fault."""

    def began(self, interrupt: Callable[[], None]) -> None:
        """See `Sink`."""

    def ended(self) -> None:
        """See `Sink`."""

    def advance(self, count: int) -> None:
        """See `Sink`."""
        self._gathering.raise_if_over(self._giver)
        if time.monotonic() > self._until_s:
            raise SlowError(f"peer {self._giver} is slow to give a block")

    def waiting(self, chain: tuple[str, ...], progress: int) -> None:
        """See `Sink`."""
        self.advance(0)
