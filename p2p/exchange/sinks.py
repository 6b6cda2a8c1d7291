"""What a peer's answer runs into: when to break it off, and to ask somebody else."""

import time
from collections.abc import Callable

from weightstream.p2p.exchange.client import PeerError
from weightstream.p2p.exchange.flights import Flight

_STUCK_S = 3.0
"""A peer that waits itself, and gets nothing at all meanwhile, is not waited for."""


class HurryError(PeerError):
    """A fault has come to a chunk that is on its way as bulk."""


class SlowError(PeerError):
    """A peer that gives far less than the others was broken off."""


class WrongError(PeerError):
    """A peer's bytes were not what they should be: the next peer is asked."""


class FlightSink:
    """A flight that a peer brings, as long as the peer keeps up."""

    def __init__(
        self, flight: Flight, node: str, me: str, slow: Callable[[], frozenset[str]]
    ) -> None:
        self._me = me
        self._flight = flight
        self._node = node
        self._slow = slow
        self._look_s = time.monotonic() + 1.0
        self._progress = -1
        self._until_s = time.monotonic() + _STUCK_S

    def advance(self, count: int) -> None:
        """See `Sink`."""
        self._flight.advance(count)
        self._look()

    def waiting(self, chain: tuple[str, ...], progress: int) -> None:
        """Break a circle of nodes that wait for each other: the first by name asks elsewhere."""
        self._flight.chain = (self._node, *chain)
        if self._me in chain:
            circle = (self._node, *chain[: chain.index(self._me) + 1])
            if self._me == min(circle):
                raise SlowError(f"{len(circle)} nodes wait for each other")
        if progress > self._progress:
            self._progress, self._until_s = progress, time.monotonic() + _STUCK_S
        if time.monotonic() > self._until_s:
            raise SlowError(f"peer {self._node} waits itself and gets nothing")
        self._look()

    def _look(self) -> None:
        if self._flight.is_hurried and not self._flight.urgent:
            raise HurryError("a reader waits for it")
        now_s = time.monotonic()
        if now_s >= self._look_s:
            self._look_s = now_s + 0.25
            if self._node in self._slow():
                raise SlowError(f"peer {self._node} gives far less than the others")
