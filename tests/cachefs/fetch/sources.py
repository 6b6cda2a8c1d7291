"""Sources with programmable behaviour, for the engine's own tests: fakes, not mocks."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Lease
from weightstream.cachefs.fetch.memory import allocate
from weightstream.cachefs.fetch.source import Transfer
from weightstream.cachefs.origin import Checksum
from weightstream.errors import LoadCancelled, UnavailableError

STEP_BYTES = 64 << 10


def content(size: int, seed: int = 0) -> bytes:
    """Bytes in which every offset is told from its neighbours."""
    block = b"".join((i * 2654435761 + seed).to_bytes(8, "little") for i in range(8192))
    return (block * (size // len(block) + 1))[:size]


@dataclass
class Request:
    """One call of `read_into`, for the behaviour to look at."""

    number: int
    blob: Blob
    extent: Extent
    cancelled: threading.Event = field(default_factory=threading.Event)

    def sleep(self, seconds: float) -> None:
        if self.cancelled.wait(seconds):
            raise LoadCancelled("cancelled")


Behaviour = Callable[[Request, int], None]
"""Called before each step with the request and the bytes sent so far; may raise or sleep."""


class FakeSource:
    """Serves bytes from memory, and does what `behaviour` says on the way."""

    name = "origin"

    def __init__(self, files: dict[Blob, bytes], behaviour: Behaviour | None = None) -> None:
        self.files = files
        self.behaviour = behaviour or (lambda request, sent: None)
        self.requests: list[Request] = []
        self.sent_bytes = 0
        self.most_at_once = 0
        self.checksums: dict[Blob, Checksum] = {}
        self._now = 0
        self._lock = threading.Lock()

    def checksum(self, blob: Blob) -> Checksum | None:
        return self.checksums.get(blob)

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        with self._lock:
            extent = Extent(start, start + len(into))
            request = Request(len(self.requests), blob, extent)
            self.requests.append(request)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        transfer.on_cancel(request.cancelled.set)
        try:
            self._serve(request, into, transfer)
        finally:
            transfer.on_cancel(None)
            with self._lock:
                self._now -= 1

    def _serve(self, request: Request, into: memoryview, transfer: Transfer) -> None:
        data, sent = self.files[request.blob], 0
        while sent < len(into):
            self.behaviour(request, sent)
            if request.cancelled.is_set():
                raise LoadCancelled("cancelled")
            step = min(STEP_BYTES, len(into) - sent)
            begin = request.extent.start + sent
            into[sent : sent + step] = data[begin : begin + step]
            sent += step
            with self._lock:
                self.sent_bytes += step
            transfer.advance(step)


class _Lease:
    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.holds = 1

    def hold(self) -> None:
        self.holds += 1

    def release(self) -> None:
        self.holds -= 1


class BufferLanding:
    """Lands a blob in one buffer, in file layout; remembers what landed."""

    exposes_memory = True

    def __init__(self, blob: Blob) -> None:
        self.memory = allocate(blob.size)
        self.size = blob.size
        self.extents: list[Extent] = []
        self.refuse_until_s = 0.0

    def reserve(self, extent: Extent) -> Lease | None:
        if time.monotonic() < self.refuse_until_s:
            return None
        return _Lease(memoryview(self.memory)[extent.start : extent.stop])

    def landed(self, extent: Extent) -> None:
        self.extents.append(extent)

    @property
    def data(self) -> bytes:
        return self.memory[: self.size]


def fail_once_after(count: int) -> Behaviour:
    """Every range breaks once, after `count` bytes."""
    broken: set[Extent] = set()

    def behave(request: Request, sent: int) -> None:
        if sent >= count and request.extent not in broken and request.extent.start % 4096 == 0:
            broken.add(request.extent)
            raise UnavailableError("connection reset")

    return behave
