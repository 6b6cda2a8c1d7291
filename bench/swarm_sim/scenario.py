"""What is simulated: a crowd, its links, what goes wrong."""

import random
from dataclasses import dataclass

MBIT = 23.95e6 / 200
"""Bytes per second of payload that a link of 1 Mbit/s carries: as measured at 200 Mbit/s."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One crowd that loads one blob."""

    name: str
    nodes: int
    size_bytes: int = 256 << 20
    chunk_bytes: int = 4 << 20
    piece_bytes: int = 256 << 10
    """Passed on as a whole: what one read of a socket gives."""
    window_bytes: int = 64 << 20
    per_peer: int | None = None
    """How many chunks a node asks of one peer at a time; None: as many as the window has."""
    late_homes: bool = False
    """Who joins late becomes home of what nobody has begun: tried, and worse."""
    origin_streams: int = 1
    ahead_chunks: int | None = None
    """How far before its first missing chunk a node reads its own part; None: as far as it goes."""
    fan_out: int | None = None
    link_bytes_s: float = 200 * MBIT
    origin_bytes_s: float = 200 * MBIT
    client_bytes_s: float | None = None
    """What the origin gives one client at most."""
    rtt_s: float = 0.0003
    stagger_s: float = 0.0
    """One node after the other begins, this much apart."""
    warm: int = 0
    """This many nodes have everything already."""
    skew: float = 1.0
    """Links differ between nodes: from 1/skew to skew of the rate, evenly on a log scale."""
    zones: int = 1
    cross_share: float = 1.0
    """What crosses the border of a zone, each way, as a share of its nodes' links together."""
    dying: float = 0.0
    """This share of the nodes dies at times spread over the first bound."""
    joining: float = 0.0
    """This share of the nodes begins at times spread over the first bound."""
    slowed: int = 0
    """This many nodes turn 10 times slower, a third into the load."""
    taking: bool = True
    """Who has begun all of its own takes over what others have not begun; in a mesh."""
    starved: int = 0
    """This many nodes get a tenth of what others get from the origin."""
    slow_detected: bool = True
    resume: bool = True
    """A broken chunk goes on at its offset from the next peer; else it starts anew."""
    silence_s: float = 1.0
    """After this long without a byte a dead peer is given up."""
    heard_s: float = 2.0
    """After this long everybody knows that a node is dead."""
    seed: int = 1

    @property
    def chunks(self) -> int:
        """Return how many chunks the blob has."""
        return -(-self.size_bytes // self.chunk_bytes)

    @property
    def pieces(self) -> int:
        """Return how many pieces a chunk has."""
        return max(1, self.chunk_bytes // self.piece_bytes)

    @property
    def window_chunks(self) -> int:
        """Return how many chunks a node asks of peers at a time."""
        return max(2, self.window_bytes // self.chunk_bytes)

    def begins(self) -> tuple[float, ...]:
        """Return when each node begins that has not everything already."""
        return tuple(i * self.stagger_s for i in range(self.nodes))

    def rates(self) -> tuple[float, ...]:
        """Return every node's link rate, bytes per second, up and down alike."""
        draw = random.Random(f"{self.seed} rates")
        return tuple(
            self.link_bytes_s * self.skew ** draw.uniform(-1.0, 1.0) for _ in range(self.nodes)
        )

    def bounds_s(self) -> tuple[float, ...]:
        """Return the least time in which each node can have the blob, were all to start at once.

        The origin has to send it once, the node to receive it, and all uplinks together to send a
        copy per node (Kumar and Ross, 2006).
        """
        rates = self.rates()
        lacking = self.nodes - self.warm
        sent = self.origin_bytes_s
        if self.client_bytes_s is not None:
            sent = min(sent, self.client_bytes_s * self.nodes)
        total = (0.0 if self.warm else sent) + sum(rates)
        crowd = lacking * self.size_bytes / total
        first = 0.0 if self.warm else self.size_bytes / sent
        return tuple(max(first, crowd, self.size_bytes / rate) for rate in rates)
