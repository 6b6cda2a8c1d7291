"""What local readers are going to want, brought ahead of them.

A node that loads a model brings its own part from the origin (the gate's work) and, at the same
time, everybody else's part from their homes, in file order, with `peer_window` bytes in flight.
In file order because that is how it is read; measured, random order took 1.64 of the bound where
this took 1.09.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from weightstream.cachefs.blob import Blob, Extent
from weightstream.p2p.exchange.flights import Flight, Shelf
from weightstream.p2p.exchange.relay import Relay
from weightstream.p2p.exchange.taking import Taking
from weightstream.p2p.schedule import route

_IDLE_S = 2.0
_LOOK_AGAIN_S = 0.25
_MOST_WORKERS = 16
_MOST_CROWD = 16
"""A mesh needs a chunk in flight from every home, or some links are idle."""
_ROOM_S = 30.0
_MOST_LACKING = 256
_AHEAD = 16
"""How far a home in a large crowd reads ahead of what is still missing, in chunks: were all homes
to read all of their part at once, each at its share of the origin's rate, everybody would wait for
the first chunks. Simulated, 100 nodes: 1.12 of the bound at 16, 1.8 without a limit."""


class Planned:
    """What one reader wants of one blob: these chunks in this order."""

    def __init__(self, relay: Relay, extents: Sequence[Extent], taking: Taking) -> None:
        self.relay = relay
        self._taking = taking
        self.chunks = _chunks(relay, extents)
        self.is_open = True
        self._next = 0
        self._next_own = 0
        self._done = 0
        self._epoch = -1
        self._seen_era = (-1, -1)

    def next_flight(self) -> Flight | None:
        """Return a new flight for the next chunk that a peer is to give."""
        relay = self.relay
        if relay.era != self._seen_era:  # what was ours, or the swarm's, may be a peer's now
            self._seen_era, self._next = relay.era, 0
        while self._next < len(self.chunks):
            chunk = self.chunks[self._next]
            self._next += 1
            if relay.is_carried(chunk) or not relay.is_wanting(chunk):
                continue
            if not route(relay.view(), chunk).is_own:
                flight, new = relay.board(chunk)
                if new:
                    flight.unread = True
                    return flight
        return None

    def _first_missing(self) -> int:
        """Return the place in the plan up to which everything is here."""
        while self._done < len(self.chunks) and self.relay.is_here(self.chunks[self._done]):
            self._done += 1
        return self._done

    def next_own(self) -> Flight | None:
        """Return a new flight for the next chunk that this node is to read from the origin."""
        relay = self.relay
        if relay.crowd.epoch != self._epoch:
            self._epoch, self._next_own = relay.crowd.epoch, 0
        view = relay.view()
        last = len(self.chunks)
        if view.fan_out is not None:
            last = min(last, self._first_missing() + _AHEAD)
        while self._next_own < last:
            chunk = self.chunks[self._next_own]
            self._next_own += 1
            if relay.is_wanting(chunk) and route(view, chunk).is_own:
                flight = relay.board_own(chunk)
                if flight is not None:
                    flight.unread = True
                    return flight
        return None

    def take(self) -> bool:
        """Take a chunk over that another node has not begun; True when it is this node's now."""
        return self._taking.take(self._lacking)

    def _lacking(self) -> Iterator[int]:
        """Yield the first chunks of which no byte has come, so many as matter."""
        first = self._first_missing()
        lacking = (chunk for chunk in self.chunks[first:] if self.relay.is_lacking(chunk))
        return islice(lacking, _MOST_LACKING)


class Bulk:
    """The plans of all readers and the threads that follow them. Thread-safe."""

    def __init__(self, shelf: Shelf, window_bytes: int, chunk_size: int) -> None:
        self._shelf = shelf
        self._most = max(2, min(_MOST_WORKERS, window_bytes // chunk_size))
        self._changed = threading.Condition()
        self._planned: list[Planned] = []
        self._picking = threading.Lock()
        self._filling = threading.Lock()
        self._taking = threading.Lock()
        self._threads = 0
        self._closed = False

    def add(self, planned: Sequence[Planned]) -> None:
        """Follow a plan from the next `poke` on."""
        with self._changed:
            self._planned.extend(planned)

    def poke(self) -> None:
        """Say that there is work."""
        with self._changed:
            crowd = max((len(one.relay.crowd.nodes) for one in self._planned), default=1)
            most = max(self._most, min(_MOST_CROWD, crowd))
            while self._threads < most and self._planned and not self._closed:
                self._threads += 1
                threading.Thread(target=self._run, daemon=True, name="weightstream-bulk").start()
            self._changed.notify_all()

    def remove(self, planned: Sequence[Planned]) -> None:
        """Stop to follow it: what runs is finished."""
        with self._changed:
            for one in planned:
                one.is_open = False
            self._planned = [one for one in self._planned if one.is_open]

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """Return what is being brought."""
        return tuple(one.relay.blob for one in tuple(self._planned))

    def next_own(self) -> Flight | None:
        """Return what the gate is to read next; see `OwnWork`."""
        with self._picking:
            for planned in tuple(self._planned):
                if (flight := planned.next_own()) is not None:
                    return flight
        return None

    def take(self) -> bool:
        """Have one of the gate's threads take a chunk over; see `OwnWork`."""
        if not self._taking.acquire(blocking=False):
            return False
        try:
            return any(planned.take() for planned in tuple(self._planned))
        finally:
            self._taking.release()

    def close(self) -> None:
        """End the threads once what they bring is over."""
        with self._changed:
            self._closed = True
            self._planned.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        idle_since_s = time.monotonic()
        while True:
            found = self._next()
            if found is not None:
                planned, flight = found
                planned.relay.bring(flight)
                idle_since_s = time.monotonic()
                continue
            with self._changed:
                if self._closed or time.monotonic() - idle_since_s > _IDLE_S:
                    self._threads -= 1
                    return
                self._changed.wait(_LOOK_AGAIN_S)

    def _next(self) -> tuple[Planned, Flight] | None:
        """Pick a flight and give it memory, one thread at a time: the first to be read gets it
        first, or a reader could wait for a chunk whose memory those behind it have taken."""
        with self._filling:
            with self._picking:
                found = self._pick()
            if found is not None:
                found[1].slab = self._shelf.take(found[1], _ROOM_S)
        return found

    def _pick(self) -> tuple[Planned, Flight] | None:
        for planned in tuple(self._planned):
            flight = planned.next_flight()
            if flight is not None:
                return planned, flight
        return None


def _chunks(relay: Relay, extents: Sequence[Extent]) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for extent in extents:
        stop = -(-min(extent.stop, relay.blob.size) // relay.chunk_size)
        found.update(dict.fromkeys(range(extent.start // relay.chunk_size, stop)))
    return tuple(found)
