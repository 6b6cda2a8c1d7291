"""What the agent knows of its peers: a source that may be told what is going to be wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.source import Plan, Source
from weightstream.cachefs.origin import Checksum


@dataclass(frozen=True, slots=True)
class PeeringStatus:
    """What a node's peering does now."""

    members: tuple[str, ...] = ()
    """Those that answer, this node among them."""
    crowds: Mapping[str, int] = field(default_factory=dict)
    """By URI: how many nodes load or hold it together with this one."""
    bytes: Mapping[str, int] = field(default_factory=dict)
    """By direction: received from peers, sent to them, read from the origin."""
    settled: bool = True
    """The members have been asked once; until then the node may think that it is alone."""


class Peering(Source, Protocol):
    """Brings bytes from peers, or from the origin once for all of them. Thread-safe."""

    def checksum(self, blob: Blob) -> Checksum | None:
        """Return the origin's checksum of the whole file, if it keeps one."""
        ...

    def plan(self, wanted: Sequence[tuple[Blob, tuple[Extent, ...]]]) -> Plan:
        """Begin with what a reader is going to want, until the plan is closed."""
        ...

    def status(self) -> PeeringStatus:
        """Return what is going on."""
        ...

    def drain(self) -> None:
        """Serve nothing new, tell the others; what runs goes on."""
        ...

    def close(self) -> None:
        """End everything; whoever reads gets `LoadCancelled`."""
        ...
