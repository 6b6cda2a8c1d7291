"""What of one blob is on this node's disk: in its store, or in the file of the swarm."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.cachefs.store.state import present_flags
from weightstream.errors import StoreError
from weightstream.p2p.exchange.carrier import Carried
from weightstream.p2p.exchange.server import HeldChunk

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5


class _Place(Protocol):
    """A file of chunks, with a digest for each that is there."""

    def digest(self, chunk: int, /) -> bytes: ...

    def read_into(self, chunk: int, offset: int, into: memoryview, /) -> bool: ...

    def open_data(self) -> int: ...


class Here:
    """Thread-safe. The store goes before the swarm's file, which is removed one day."""

    def __init__(
        self,
        blob: Blob,
        chunk_size: int,
        store: Store | None,
        carried: Callable[[], Carried | None],
    ) -> None:
        self._blob = blob
        self._chunk_size = chunk_size
        self._n_chunks = -(-blob.size // chunk_size)
        self._store = store
        self._carried = carried
        self._stored: StoredBlob | None = None
        self._looked_s = 0.0

    def flags(self) -> bytearray:
        """Return a byte per chunk: 1 where it is here."""
        carried, flags = self._carried(), self._stored_flags()
        if carried is not None:
            for i in range(self._n_chunks):
                flags[i] |= carried.has(i)
        return flags

    def has(self, i: int) -> bool:
        """Say whether chunk `i` is here."""
        return bool(self._places(i))

    def in_store(self, i: int) -> bool:
        """Say whether chunk `i` is in the store."""
        stored = self.stored()
        return stored is not None and bool(present_flags(bytes([stored.state(i)]))[0])

    def read(self, i: int, offset: int, into: memoryview) -> bool:
        """Read from chunk `i`; False when it is not here."""
        return any(place.read_into(i, offset, into) for place in self._places(i))

    def digest(self, i: int) -> bytes | None:
        """Return the BLAKE3 of chunk `i` if it is here."""
        try:
            return next((place.digest(i) for place in self._places(i)), None)
        except StoreError:  # dropped meanwhile
            return None

    def held(self, i: int, extent: Extent) -> HeldChunk | None:
        """Return chunk `i`, verified, to be sent."""
        for place in self._places(i):
            try:
                if place.read_into(i, 0, memoryview(bytearray(1))):
                    return HeldChunk(place.open_data(), extent.start, len(extent), place.digest(i))
            except StoreError as error:
                log.debug("not served from disk: %s", error)
        return None

    def stored_chunks(self) -> Sequence[int]:
        """Return the chunks that are in the store."""
        return [i for i, flag in enumerate(self._stored_flags()) if flag]

    def whole_path(self) -> Path | None:
        """Return the store's file if every chunk is in it."""
        stored = self.stored()
        whole = stored is not None and all(self._stored_flags())
        return stored.data_path if stored is not None and whole else None

    def stored(self) -> StoredBlob | None:
        """Return the blob of the store; looks for it now and then."""
        now_s = time.monotonic()
        if self._stored is None and self._store is not None and now_s >= self._looked_s:
            self._looked_s = now_s + _LOOK_AGAIN_S
            try:
                found = self._store.find_blob(self._blob)
            except StoreError as error:
                log.debug("no store behind %s: %s", self._blob.uri, error)
                return None
            if found is not None and found.chunk_size != self._chunk_size:
                found.close()
                found = None
            self._stored = found
        return self._stored

    def close(self) -> None:
        """Let go of the store's blob."""
        if self._stored is not None:
            self._stored.close()

    def _stored_flags(self) -> bytearray:
        stored = self.stored()
        return bytearray(present_flags(stored.states()) if stored else self._n_chunks)

    def _places(self, i: int) -> Sequence[_Place]:
        stored, carried = self.stored(), self._carried()
        places: list[_Place] = [stored] if stored is not None and self.in_store(i) else []
        return [*places, carried] if carried is not None and carried.has(i) else places
