"""Keep what was fetched, off the critical path.

Chunks are offered by reference: the same memory that the reader got is hashed and written (O_DIRECT
from huge pages costs 0.36-0.41 CPU s/GB for memory and disk together). So until a chunk is written
its memory must not change: `settle` ends that dependence before a reader hands the memory to code
that may write to it, by copying queued chunks within the memory budget and skipping the rest.

A chunk's lock (taken by the flow before it fetched) is released when it is written or skipped, so
that other processes wait for the bytes exactly as long as there is hope for them. Only `finish`
seals a blob, after the end-to-end check.

    offered -> queued -> running -> kept
                  \\-> copied (settle) -> running -> kept
                  \\-> skipped (settle, shed, full disk)
"""

import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from awscrt import checksums
from blake3 import blake3

from weightstream import metrics
from weightstream.cachefs.fetch.landing import Lease
from weightstream.cachefs.fetch.slabs import SlabPool
from weightstream.cachefs.store.store import Store
from weightstream.cachefs.store.stored import StoredBlob
from weightstream.errors import StoreError

log = logging.getLogger(__name__)

_SYNC_EVERY_BYTES = 512 << 20
_MOST_COPIED_BYTES = 16 << 20
_IDLE_S = 2.0
_PAUSE_AFTER_FAILURE_S = 60.0


@dataclass(slots=True, eq=False)
class _Offer:
    owner: object
    journal: "_Journal"
    chunk: int
    lease: Lease
    crc64nvme: int | None
    abandoned: bool = False


@dataclass(slots=True, eq=False)
class _Journal:
    """What is under way for one blob."""

    store: Store
    stored: StoredBlob
    pending: int = 0
    unsynced_bytes: int = 0
    room: bool | None = None
    verdicts: list[bool] = field(default_factory=list)


class WriteBack:
    """The queue and its few threads; thread-safe; nobody ever waits for a disk but `settle`,
    which waits for the writes that run at that moment (a chunk each)."""

    def __init__(self, slabs: SlabPool) -> None:
        self._slabs = slabs
        self._changed = threading.Condition()
        self._queue: deque[_Offer] = deque()
        self._finishing: deque[_Journal] = deque()
        self._running: set[_Offer] = set()
        self._journals: dict[int, _Journal] = {}
        self._closing: list[StoredBlob] = []
        self.judge: Callable[[StoredBlob], bool] = lambda stored: True
        """Asked before a blob that came in parts is sealed: no flow saw all of its bytes."""
        self._threads = 0
        self._busy = 0
        self._most_threads = max(1, min(4, os.cpu_count() or 1))
        self._paused_until_s = 0.0
        self._silent_until_s = 0.0

    # What flows call

    def offer(
        self,
        owner: object,
        store: Store,
        stored: StoredBlob,
        chunk: int,
        lease: Lease,
        crc64nvme: int | None,
    ) -> None:
        """Take a locked chunk for keeping: hashes, writes and unlocks it, or skips it."""
        with self._changed:
            journal = self._journals.setdefault(id(stored), _Journal(store, stored))
            journal.pending += 1
            lease.hold()
            self._queue.append(_Offer(owner, journal, chunk, lease, crc64nvme))
            metrics.QUEUED_CHUNKS.inc()
            self._wake()

    def settle(self, owner: object, patience_s: float, longest_s: float) -> None:
        """Return when no queued or running write needs the memory of `owner`'s offers any more.

        The disk has `patience_s` to catch up. Of what is queued then, a little is copied, because
        the memory comes on top of the reader's own, and the rest is skipped.
        """
        self._await_queued(owner, patience_s)
        room_bytes = _MOST_COPIED_BYTES
        while (offer := self._take_back(owner)) is not None:
            room_bytes -= len(offer.lease.view)
            self._copy_or_skip(offer, room_bytes >= 0)
        until = time.monotonic() + longest_s
        with self._changed:
            while any(o.owner is owner and not o.abandoned for o in self._running):
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    self._abandon(owner)
                    return

    def finish(self, store: Store, stored: StoredBlob, good: bool) -> None:
        """Close `stored` when its offers have ended: made durable, and sealed when complete.

        All of it is dropped unless `good`: the bytes did not fail the end-to-end check.
        """
        with self._changed:
            journal = self._journals.setdefault(id(stored), _Journal(store, stored))
            journal.verdicts.append(good)
            if journal.pending == 0:
                self._finishing.append(journal)
                self._wake()

    def shed(self) -> bool:
        """Skip the oldest queued chunk to free its memory for a load; False when none is queued.

        Chunks that still have an owner lie in the reader's memory: skipping those frees nothing.
        """
        with self._changed:
            offer = next((one for one in self._queue if one.owner is None), None)
            if offer is None:
                return False
            self._queue.remove(offer)
        self._end(offer, skipped="memory")
        return True

    def drain(self, longest_s: float) -> bool:
        """Wait until everything offered has ended; False when the time was too short."""
        until = time.monotonic() + longest_s
        with self._changed:
            while self._finishing or self._busy or any(j.pending for j in self._journals.values()):
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    return False
        return True

    def wait(self, stored: StoredBlob, longest_s: float) -> bool:
        """Wait until everything offered and finished for one blob has ended; False: it has not."""
        until = time.monotonic() + longest_s
        with self._changed:
            while id(stored) in self._journals or any(one is stored for one in self._closing):
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    return False
        return True

    # Threads

    def _wake(self) -> None:
        """Start or wake a thread; the lock is held."""
        if self._threads < self._most_threads and self._threads == self._busy:
            self._hire()
        self._changed.notify_all()

    def _hire(self) -> None:
        try:
            threading.Thread(target=self._run, name="weightstream-write-back", daemon=True).start()
        except RuntimeError as error:  # a limit on threads, or the interpreter ends
            log.debug("no thread more for write-back than %d: %s", self._threads, error)
            return
        self._threads += 1

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                self._write(task) if isinstance(task, _Offer) else self._close(task)
            except Exception:  # a bug: the other chunks must not wait for a dead thread
                log.exception("unexpected, in write-back")
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

    def _next(self) -> "_Offer | _Journal | None":
        with self._changed:
            while not (self._queue or self._finishing):
                if not self._changed.wait(_IDLE_S):
                    if self._queue or self._finishing:
                        break
                    self._threads -= 1
                    return None
            self._busy += 1
            if not self._queue:
                return self._finishing.popleft()
            offer = self._queue.popleft()
            self._running.add(offer)
            return offer

    # One chunk

    def _write(self, offer: _Offer) -> None:
        skipped: str | None = "failed"
        try:
            skipped = self._write_chunk(offer)
        except (StoreError, OSError) as error:
            self.pause(str(error))
        finally:
            due = self._is_sync_due(offer.journal)
            self._end(offer, skipped)
        if due:
            self._sync_now_and_then(offer.journal)

    def _is_sync_due(self, journal: _Journal) -> bool:
        """Say whether to sync now; if so, the journal stays open until that is done."""
        with self._changed:
            due = journal.unsynced_bytes >= _SYNC_EVERY_BYTES
            if due:
                journal.unsynced_bytes = 0
                journal.pending += 1
            return due

    def _write_chunk(self, offer: _Offer) -> str | None:
        """Write one chunk; return why it was skipped, or None."""
        journal, stored, data = offer.journal, offer.journal.stored, offer.lease.view
        if time.monotonic() < self._paused_until_s or not self._has_room(journal):
            return "full"
        crc = checksums.crc64nvme(data) if offer.crc64nvme is None else offer.crc64nvme
        digest = blake3(data).digest()
        if offer.abandoned:  # the hash may be one of bytes that the caller wrote
            return "abandoned"
        stored.write(offer.chunk, data, digest, crc)
        if offer.abandoned:
            stored.drop(offer.chunk)
            return "abandoned"
        metrics.WRITTEN_BYTES.inc(len(data))
        journal.unsynced_bytes += len(data)
        return None

    def _end(self, offer: _Offer, skipped: str | None) -> None:
        if skipped is not None:
            metrics.SKIPPED_CHUNKS.labels(skipped).inc()
        metrics.QUEUED_CHUNKS.dec()
        try:
            offer.journal.stored.unlock(offer.chunk)
        except StoreError as error:  # closed: its locks went with it
            log.debug("cannot unlock chunk %d: %s", offer.chunk, error)
        try:
            offer.lease.release()
        finally:
            with self._changed:
                self._running.discard(offer)
            self._leave(offer.journal)

    def _leave(self, journal: _Journal) -> None:
        """Count one user of the journal less; the last one has it closed."""
        with self._changed:
            journal.pending -= 1
            if journal.pending == 0 and journal.verdicts:
                self._finishing.append(journal)
                self._wake()
            self._changed.notify_all()

    def _sync_now_and_then(self, journal: _Journal) -> None:
        """Bound what a power loss can take. Never on the last chunk: `finish` seals."""
        try:
            if _missing_bytes(journal):
                journal.stored.sync()
        except StoreError as error:
            self.pause(str(error))
        finally:
            self._leave(journal)

    # Settling

    def _take_back(self, owner: object) -> _Offer | None:
        with self._changed:
            # From the end: the threads take from the front, and what they take need not be copied.
            for offer in reversed(self._queue):
                if offer.owner is owner:
                    self._queue.remove(offer)
                    return offer
        return None

    def _await_queued(self, owner: object, patience_s: float) -> None:
        until = time.monotonic() + patience_s
        with self._changed:
            while any(offer.owner is owner for offer in self._queue):
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    return

    def _copy_or_skip(self, offer: _Offer, may_copy: bool) -> None:
        slab = self._slabs.try_take(len(offer.lease.view)) if may_copy else None
        if slab is None:
            self._end(offer, skipped="memory")
            return
        try:
            copy(offer.lease.view, slab.view)
        except BaseException:  # a Ctrl-C in the caller's thread: nobody else knows of this offer
            slab.release()
            self._end(offer, skipped="failed")
            raise
        offer.lease.release()
        with self._changed:
            offer.lease, offer.owner = slab, None
            self._queue.append(offer)
            self._wake()

    def _abandon(self, owner: object) -> None:
        """Give up on writes that the disk does not end; the lock is held."""
        for offer in self._running:
            if offer.owner is owner:
                offer.abandoned = True
                log.warning(
                    "write-back of %s hangs; chunk %d is not kept",
                    offer.journal.stored.blob.uri,
                    offer.chunk,
                )

    # One blob

    def _close(self, journal: _Journal) -> None:
        with self._changed:
            if journal.pending or not journal.verdicts:
                return  # offered again: the last offer's end brings it back; or queued twice
            verdicts, journal.verdicts = journal.verdicts, []
            if self._journals.get(id(journal.stored)) is journal:
                del self._journals[id(journal.stored)]
            stored = journal.stored
            self._closing.append(stored)
        try:
            whole = _missing_bytes(journal) == 0 and not stored.complete
            if not all(verdicts) or (whole and not self.judge(stored)):
                for chunk in range(stored.n_chunks):
                    stored.drop(chunk)
            elif journal.store.writable:
                stored.sync()
        except StoreError as error:
            self.pause(str(error))
        finally:
            for _ in verdicts:
                stored.close()
            with self._changed:
                self._closing.remove(stored)
                self._changed.notify_all()

    # Space

    def _has_room(self, journal: _Journal) -> bool:
        """Make room for the whole blob, once; evicts. False when there is none to be had."""
        if journal.room is None:
            journal.room = self._make_room(journal)
        return journal.room

    def _make_room(self, journal: _Journal) -> bool:
        """Evict until this blob fits beside what other blobs under way still need."""
        store = journal.store
        # A chunk that is being written is both on the disk and missing for a moment, so a sum may
        # be a chunk or two too large: look again before giving up.
        for last in (False, False, True):
            needed = _missing_bytes(journal) + self._promised_bytes(store)
            if (room := store.room_bytes()) >= needed:
                return True
            if not last:
                store.evict(needed)
        uri = journal.stored.blob.uri
        self._say(f"{store.path} has room for {max(0, room)} of the {needed} bytes of {uri}")
        return False

    def _promised_bytes(self, store: Store) -> int:
        with self._changed:
            # Under the lock: a journal leaves before its blob is closed.
            others = [j for j in self._journals.values() if j.room and j.store is store]
            return sum(_missing_bytes(journal) for journal in others)

    def pause(self, cause: str) -> None:
        """Stop writing for a while, and say so once."""
        with self._changed:
            self._paused_until_s = time.monotonic() + _PAUSE_AFTER_FAILURE_S
        self._say(cause)

    def _say(self, cause: str) -> None:
        now = time.monotonic()
        with self._changed:
            quiet, self._silent_until_s = now < self._silent_until_s, now + _PAUSE_AFTER_FAILURE_S
        if not quiet:
            log.warning("going on without the store: %s", cause)


def _missing_bytes(journal: _Journal) -> int:
    return journal.stored.blob.size - journal.stored.present_bytes()


def copy(source: memoryview, target: memoryview) -> None:
    """Copy bytes with the interpreter lock released (a slice assignment would hold it)."""
    anchor = ctypes.c_char.from_buffer
    ctypes.memmove(ctypes.addressof(anchor(target)), ctypes.addressof(anchor(source)), len(source))
