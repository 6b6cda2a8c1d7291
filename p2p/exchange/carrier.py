"""What the exchange asks of another transport that may carry its bulk: the swarm.

The carrier never decides who reads the origin, and never brings a fault: homes and faults are the
exchange's. It passes on what this node's gate reads, and brings what others' gates read. What it
brought, and checked, is in a file of its own: the exchange reads and serves it from there as it
does from the store. What it does not bring in time the exchange brings, so nothing depends on it.
"""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from weightstream.errors import WeightstreamError
from weightstream.p2p.exchange.flights import Flight

if TYPE_CHECKING:
    from weightstream.p2p.exchange.relay import Relay


class Carried(Protocol):
    """One blob on the other transport. Thread-safe."""

    @property
    def era(self) -> int:
        """Return a number that changes when what `carries` says may have."""
        ...

    def carries(self, chunk: int) -> bool:
        """Say that it brings a wanted chunk: the exchange need not ask peers for it."""
        ...

    def want(self, chunks: Iterable[int]) -> None:
        """Begin to bring chunks that are not here."""
        ...

    def rest(self) -> None:
        """Bring nothing more; go on to serve what is there."""
        ...

    def park(self, flight: Flight) -> None:
        """Hear that a reader waits for a chunk: its flight fails with `ArrivedError` when the
        chunk is here, and is brought by the exchange when it does not come in time."""
        ...

    def offer(self, flight: Flight) -> None:
        """Hear that there is more of a flight; pass on what may be trusted."""
        ...

    def meet(self, node: str, port: int) -> None:
        """Hear that a member takes part, and on which port."""
        ...

    def has(self, chunk: int) -> bool:
        """Say whether a chunk is here and checked."""
        ...

    def digest(self, chunk: int) -> bytes:
        """Return the BLAKE3 of a chunk that is here."""
        ...

    def stands_by(self, chunk: int) -> bool:
        """Say that a chunk was checked, and nothing wrong of it was passed on before."""
        ...

    def read_into(self, chunk: int, offset: int, into: memoryview) -> bool:
        """Fill `into` from a chunk; False when it is not here."""
        ...

    def open_data(self) -> int:
        """Return a new descriptor of the file that holds the chunks; the caller closes it."""
        ...

    def close(self) -> None:
        """Take no part any more, and remove the file."""
        ...


class Carrier(Protocol):
    """The other transport of a node. Thread-safe."""

    @property
    def port(self) -> int:
        """Return where it listens; 0 while it does not."""
        ...

    def carry(self, relay: "Relay") -> Carried | None:
        """Take part with a blob; None where that cannot be."""
        ...

    def close(self) -> None:
        """End it."""
        ...


def carry(relay: "Relay", carrier: Carrier | None) -> Carried | None:
    """Take part in a blob's swarm, where there is one that has not been found wrong."""
    with relay.carrying:
        may_trust = not relay.crowd.is_refuted
        if relay.carried is None and carrier is not None and may_trust:
            relay.used_s = time.monotonic()
            relay.carried = carrier.carry(relay)
        return relay.carried


class ArrivedError(WeightstreamError):
    """Ends a parked flight: its chunk is here by now. Never leaves the exchange."""
