"""Landing in host memory: one anonymous huge-page mapping per blob, laid out as the file is.

An offset in memory is the offset in the file, so sockets write where the tensors will be, pages of
bytes that nobody wants are never touched, and chunks are aligned for O_DIRECT write-back. The
tensors share the mapping; `views` gives each one's pages back when it dies.
"""

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.memory import allocate


class HostLease:
    """A piece of the mapping. Holding it costs nothing: the mapping outlives the flow."""

    __slots__ = ("view",)

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def hold(self) -> None:
        """Do nothing: `Flow.settle` ends the write-back's use before the caller gets tensors."""

    def release(self) -> None:
        """Do nothing."""


class HostLanding:
    """The whole of one blob, virtual until bytes land."""

    exposes_memory = True

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.memory = allocate(blob.size)
        self._view = memoryview(self.memory)

    def reserve(self, extent: Extent) -> HostLease:
        """Return the place of `extent`; there is always room."""
        return HostLease(self._view[extent.start : extent.stop])

    def landed(self, extent: Extent) -> None:
        """Do nothing: readers wait at the flow."""

    def bytes_of(self, extent: Extent) -> bytes:
        """Return a copy of bytes that have landed."""
        return bytes(self._view[extent.start : extent.stop])
