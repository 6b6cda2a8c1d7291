"""What a peer's answer runs into: when to break it off, and to ask somebody else."""

import time
from collections.abc import Callable
from typing import Protocol

from weightstream.p2p.exchange.client import PeerError
from weightstream.p2p.exchange.flights import Flight

_STUCK_S = 3.0
"""A peer that waits itself, and gets nothing at all meanwhile, is not waited for."""
_JUDGED_S, _LONGEST_S = 5.0, 60.0
WORTH_TIMES = 4.0
"""What is left of a chunk has to take so many times as long as all of it from another: who is
asked next begins anew, and may have to read it from the origin once more."""
_FAULT_JUDGED_S, _FAULT_LONGEST_S = 2.0, 30.0
"""After so much sending a chunk that would take so long in all is asked of somebody else. Readers
see a peer's bytes when all are there, and give up after a minute (`deadline_s`). There need be
nobody to compare with: where one node after the other came, each asks one only."""

_DAWDLE_JUDGED_S, _DAWDLE_LONGEST_S = 1.0, 10.0
"""The same of one that the swarm found slow: of 8 nodes each gives 8 MiB in 3 s at 200 Mbit/s."""


class HurryError(PeerError):
    """A fault has come to a chunk that is on its way as bulk."""


class ScatteredError(PeerError):
    """The rest of a chunk is to be shared with others who want it."""


class PartsError(PeerError):
    """What several peers gave of a chunk is not all of it, or not right."""


class TakenError(PeerError):
    """This node has taken over a chunk that it waits for."""


class SlowError(PeerError):
    """A peer that gives far less than the others was broken off."""


class WrongError(PeerError):
    """A peer's bytes were not what they should be: the next peer is asked."""


class Judge(Protocol):
    """What is known of peers."""

    def is_slow(self, node: str, times: float) -> bool:
        """Say that a node gives less than a `times`-th of what others give."""
        ...

    def dawdles(self, node: str) -> bool:
        """Say that another transport found a node slow."""
        ...

    def is_banned(self, node: str) -> bool:
        """Say that a node is never asked again."""
        ...


class FlightSink:
    """A flight that a peer brings, as long as the peer keeps up."""

    def __init__(
        self, flight: Flight, node: str, me: str, judge: Judge, is_last: bool = False
    ) -> None:
        """`is_last`: nobody else has it, so that a slow peer is waited for."""
        self._me = me
        self._flight = flight
        self._node = node
        self._judge = judge
        self._is_last = is_last
        self._look_s = time.monotonic() + 1.0
        self._first_s = 0.0
        self._progress = -1
        self._until_s = time.monotonic() + _STUCK_S

    @property
    def is_hurried(self) -> bool:
        """See `Sink`."""
        return self._flight.is_hurried

    def began(self, interrupt: Callable[[], None]) -> None:
        """See `Sink`."""
        self._flight.asks(interrupt)

    def ended(self) -> None:
        """See `Sink`."""
        self._flight.asks(None)

    def advance(self, count: int) -> None:
        """See `Sink`."""
        self._first_s = self._first_s or time.monotonic()
        self._flight.advance(count)
        self._look()

    def waiting(self, chain: tuple[str, ...], progress: int) -> None:
        """Break a circle of nodes that wait for each other: the first by name asks elsewhere."""
        self._flight.chain = (self._node, *chain)
        if self._flight.is_taken:
            raise TakenError("it is this node's to read now")
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
        if self._flight.asks_again and not self._flight.urgent:
            raise HurryError("a reader waits for it")
        if self._flight.scatter is not None:
            raise ScatteredError("the rest of it is shared")
        if self._judge.is_banned(self._node):
            raise WrongError(f"peer {self._node} gave wrong bytes of another chunk")
        now_s = time.monotonic()
        if now_s >= self._look_s:
            self._look_s = now_s + 0.25
            left = 1 - self._flight.position / len(self._flight.extent)
            is_worth_it = left > 0 and not self._is_last
            if is_worth_it and self._judge.is_slow(self._node, WORTH_TIMES / left):
                raise SlowError(f"peer {self._node} gives far less than the others")
            if self._is_hopeless(now_s - self._first_s):
                raise SlowError(f"peer {self._node} would not be done in time")

    def _is_hopeless(self, sending_s: float) -> bool:
        judged_s, longest_s = _JUDGED_S, _LONGEST_S
        if self._flight.urgent:  # it goes before bulk everywhere
            judged_s, longest_s = _FAULT_JUDGED_S, _FAULT_LONGEST_S
        if self._judge.dawdles(self._node) and not self._is_last:
            judged_s, longest_s = _DAWDLE_JUDGED_S, _DAWDLE_LONGEST_S
        if not self._first_s or sending_s < judged_s:
            return False
        return sending_s * len(self._flight.extent) > longest_s * self._flight.position
