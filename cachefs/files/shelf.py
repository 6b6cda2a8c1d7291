"""The files that somebody reads or has open, and what the store has of the others.

Lock: one for the tables, never held across the store's I/O.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.files.entries import File
from weightstream.cachefs.files.held import Held
from weightstream.cachefs.files.order import AccessOrder
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.cachefs.store.write_back import WriteBack
from weightstream.errors import StoreError
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_IDLE_S = 10.0
_SEEN_COMPLETE_S = 1.0

State = Literal["absent", "partial", "filling", "complete"]


@dataclass(frozen=True, slots=True)
class ContentState:
    """How much of a file is here."""

    state: State
    present_bytes: int


class Shelf:
    """The held files of one `Content`. Thread-safe."""

    def __init__(self, store: Store | None, settings: Settings, write_back: WriteBack) -> None:
        self._store = store
        self._keeps = store is not None and store.writable and settings.write_back == "on"
        self._chunk_bytes = settings.chunk_size
        self._write_back = write_back
        self._lock = threading.Lock()
        self._helds: dict[str, Held] = {}
        self._orders: dict[str, AccessOrder] = {}
        self._complete_until_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._helds)

    def hold(self, file: File) -> Held:
        """Return the entry of a file that is read, with its place in the store, made if need be."""
        held = self._entry(file)
        if not held.is_placed:
            self._place(held, self._open(file.blob))
        return held

    def _entry(self, file: File) -> Held:
        """Return a file's entry; the store is only looked at, nothing is made for a mere open."""
        held = self._helds.get(file.blob.id)
        if held is not None:
            return held
        stored = self.find(file.blob)
        with self._lock:
            made = Held(file, stored, self._chunk_bytes, self._order(file))
            held = self._helds.setdefault(file.blob.id, made)
        if held is not made:
            made.close()
        elif stored is not None:
            stored.touch()
        return held

    def _place(self, held: Held, stored: StoredBlob | None) -> None:
        with self._lock:
            first = not held.is_placed
            if first:
                held.is_placed, held.stored = True, stored
        if not first and stored is not None:
            stored.close()  # another thread was faster

    def _order(self, file: File) -> AccessOrder:
        order = self._orders.get(file.folder)
        if order is None:
            home = self._store.path if self._store is not None and self._keeps else None
            order = AccessOrder(home, file.blob.uri.rsplit("/", 1)[0])
            self._orders[file.folder] = order
        return order

    def _open(self, blob: Blob) -> StoredBlob | None:
        if self._store is None or not blob.version or not blob.size:
            return None
        try:
            return self._store.open_blob(blob) if self._keeps else self._store.find_blob(blob)
        except StoreError as error:
            self._write_back.pause(str(error))
            return None

    # Opens

    def opened(self, file: File) -> None:
        """Count an open: the file is in use in the store until it is closed."""
        while True:
            held = self._entry(file)
            with self._lock:
                if self._helds.get(file.blob.id) is held:
                    held.opens += 1
                    return

    def released(self, file: File) -> None:
        """Count the end of an open."""
        with self._lock:
            held = self._helds.get(file.blob.id)
            if held is not None and held.opens:
                held.opens -= 1

    # What is here

    def find(self, blob: Blob) -> StoredBlob | None:
        """Open a blob in the store, if it is there; the caller closes it."""
        if self._store is None or not blob.version or not blob.size:
            return None
        try:
            return self._store.find_blob(blob)
        except StoreError as error:
            log.debug("not in the store: %s", error)
            return None

    def is_complete(self, blob: Blob) -> bool:
        """Say whether all of a blob is in the store, verified and sealed; remembered for 1 s."""
        held = self._helds.get(blob.id)
        if held is not None and held.stored is not None:
            return is_complete(held.stored)
        now = time.monotonic()
        if self._complete_until_s.get(blob.id, 0.0) > now:
            return True
        stored = self.find(blob)
        if stored is None:
            return False
        with stored:
            complete = is_complete(stored)
        if complete:
            self._complete_until_s[blob.id] = now + _SEEN_COMPLETE_S
        return complete

    def backing(self, blob: Blob) -> int | None:
        """Return a new read-only descriptor of a complete blob's data; the caller closes it."""
        stored = self.find(blob)
        if stored is not None:
            with stored:
                if is_complete(stored):
                    return stored.open_data()
        self._complete_until_s.pop(blob.id, None)
        return None

    def state(self, blob: Blob, filling: bool) -> ContentState:
        """Return how much of a blob is here."""
        if not blob.size or self.is_complete(blob):
            return ContentState("complete", blob.size)
        stored = self.find(blob)
        present = 0
        if stored is not None:
            with stored:
                present = stored.present_bytes()
        if filling:
            return ContentState("filling", present)
        return ContentState("partial" if present else "absent", present)

    # Letting go

    def let_go(self, now: float, is_busy: Callable[[Held], bool]) -> list[Held]:
        """Take out and return what nobody used lately; the caller closes it."""
        with self._lock:
            idle = [
                held
                for held in self._helds.values()
                if not held.opens and now - held.used_s > _IDLE_S and not is_busy(held)
            ]
            for held in idle:
                del self._helds[held.blob.id]
            if not self._helds:
                self._orders.clear()
            self._complete_until_s = {
                blob_id: until_s
                for blob_id, until_s in self._complete_until_s.items()
                if until_s > now
            }
        return idle

    def clear(self) -> list[Held]:
        """Take out everything; the caller closes it."""
        with self._lock:
            helds, self._helds = list(self._helds.values()), {}
            self._orders.clear()
        return helds


def is_complete(stored: StoredBlob) -> bool:
    """Say whether a stored blob is complete; one that was closed meanwhile is not."""
    try:
        return stored.complete
    except StoreError:
        return False
