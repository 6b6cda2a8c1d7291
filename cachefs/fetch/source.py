"""The small protocol behind which every source of bytes stands: origin, store, peer."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from weightstream.cachefs.blob import Blob, Extent


class Transfer(Protocol):
    """What a source tells the engine about one range while it reads it, and hears from it."""

    step_bytes: int
    """How often it wants to hear, at the least: bytes that are passed on must not lie around."""

    is_fresh: bool
    """The memory has no pages yet: a source that `brings` faults it in (`memory.populate`)."""

    @property
    def urgent(self) -> bool:
        """Say that a reader waits for this very range; may become true while it is read."""
        ...

    def link_share(self) -> float | None:
        """Return this stream's part, in bytes a second, of a link over which several nodes read
        from one origin; None: it shares none, and will not before it is over. Changes while it is
        read. See `cachefs.origin.windows`."""
        ...

    def advance(self, count: int) -> None:
        """Say that the next `count` bytes of the range are valid in the buffer.

        Called from the reading thread, in order. A good step is 256 KiB to 2 MiB: small enough to
        wake readers early, large enough to cost nothing. Raises `LoadCancelled` when nobody wants
        the bytes any more.
        """
        ...

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        """Register what unblocks the reading thread (shut the socket down); None takes it back.

        The callback runs on another thread; at once when the transfer is cancelled already.
        """
        ...


class Source(Protocol):
    """Reads ranges of blobs."""

    name: str
    """The label in metrics and progress: `origin`, `store`, `peer`."""

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        """Fill `into` with bytes [start, start + len(into)) of `blob`.

        One attempt: no retries, no resumption; the engine does both, from the byte that the last
        `advance` reached. Raises an `OriginError` whose `transient` says whether to try again.
        Every wait inside is bounded. Thread-safe.
        """
        ...


class Plan(Protocol):
    """What a source was told about the future of one flow."""

    def hurry(self, blob: Blob, extent: Extent) -> None:
        """Hear that a reader waits for these bytes now; returns at once."""
        ...

    def close(self) -> None:
        """Say that the flow has ended."""
        ...


@runtime_checkable
class Plans(Protocol):
    """A source that wants to know what a flow is going to ask for, to begin with it by itself."""

    brings: bool
    """What it is asked for is on its way into memory of its own, in an order of its own. So it is
    asked for one chunk at a time, and it is the source that faults fresh memory in, once it has
    bytes for it: see `Transfer.is_fresh`. When all that was asked for was faulted in at once, a
    crowd of 8 nodes on 2 cores began 0.3 s later."""

    def plan(self, wanted: Sequence[tuple[Blob, tuple[Extent, ...]]]) -> Plan:
        """Begin with these extents, until the plan is closed. May wait; raises nothing."""
        ...
