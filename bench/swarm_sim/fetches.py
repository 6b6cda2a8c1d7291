"""What is on its way, and from where."""

from dataclasses import dataclass, field

from weightstream.bench.swarm_sim.network import Flow, Link


@dataclass(slots=True)
class Fetch:
    """A chunk on its way to a node: `QUEUED` at its gate, or asked of `source`."""

    chunk: int
    planned: bool
    began_s: float = 0.0
    source: str | None = None
    flow: Flow | None = None
    tried: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    """Who was left because it was slow."""
    insist: bool = False
    """Whoever is asked is to read it from the origin when it lacks it."""
    relayed: bool = False
    """Whoever is asked is to bring it from its own parent when it lacks it."""


class Origin:
    """Has everything."""

    def __init__(self, up: Link) -> None:
        self.up = up
        self.sent_pieces = 0


def flow_broken(flow: Flow, fetch: Fetch) -> None:
    """Tell the receiver."""
    flow.target.broken(fetch, flow)
