"""The tree that a mount shows: one folder at a time, listed when somebody asks for it.

Threads: whoever asks, and one per listing under way (`weightstream-listing`). One lock guards what
is known; it is never held while anybody waits, so that a listing that hangs holds up only those who
need that very folder. One listing per folder is under way at a time (a `Flight`), and who comes
meanwhile waits for its answer.

    unknown ──asked──> fresh ──TTL, refresh──> stale ──asked again──> fresh
                                                 └─ shown while the origin is silent, or slow

A listing that is older than its TTL is asked for again, and who asks waits for that, but not
long: after `STALE_PATIENCE_S` what was listed before is shown, the answer is for who comes later.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from pathlib import Path

from weightstream.cachefs.files.entries import (
    Change,
    Entry,
    File,
    Folder,
    find,
    is_below,
    lost_folders,
    reconcile,
)
from weightstream.cachefs.files.flight import Flight
from weightstream.cachefs.files.lister import Lister
from weightstream.cachefs.files.listings import Listing, Listings
from weightstream.cachefs.files.names import is_path
from weightstream.cachefs.files.outage import Outage, is_silence
from weightstream.cachefs.files.snapshot import Snapshot
from weightstream.cachefs.origin import Origin
from weightstream.errors import (
    AccessDeniedError,
    LoadCancelled,
    NotFoundError,
    UnavailableError,
    WeightstreamError,
)
from weightstream.log import get_logger
from weightstream.settings import Settings

__all__ = ["Change", "Entry", "File", "Folder", "Tree"]

log = get_logger(__name__)

STALE_PATIENCE_S = 5.0
MAX_FLIGHTS = 64  # beyond that, a stale listing is shown without asking
_REFRESHED_AT_ONCE = 8

OnChange = Callable[[Sequence[Change]], None]


class Tree:
    """Files and folders under one root. Thread-safe."""

    def __init__(
        self,
        uri: str,
        origin: Origin,
        settings: Settings,
        snapshot_path: Path | None,
        on_change: OnChange,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_change` is called on a thread of the tree's own, after the listing is shown."""
        self._lister = Lister(uri, origin)
        self.uri = self._lister.root
        self._ttl_s = settings.listing_ttl_s
        self._deadline_s = settings.deadline_s
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._listings = Listings()
        self._flights: dict[str, Flight] = {}
        self._telling: set[Flight] = set()
        self._outage = Outage()
        self._probe: Flight | None = None
        self._closed = False
        self._snapshot: Snapshot | None = None
        if snapshot_path is not None:
            self._snapshot = Snapshot(snapshot_path, self.uri, self._lister.is_web, self._copy)
            for path, entries in self._snapshot.load().items():
                self._listings.put(path, Listing(entries, -inf))

    def peek(self, path: str) -> tuple[Entry, ...] | None:
        """Return a folder's entries if they may be shown without asking anybody."""
        with self._lock:
            known = self._listings.get(path)
            return known.entries if known is not None and self._suffices(known) else None

    def children(self, path: str) -> tuple[Entry, ...]:
        """Return a folder's entries, sorted by name; nothing where there is no such folder.

        May ask the origin, and raises what it says; waits `deadline_s` at most.
        """
        with self._lock:
            self._check_open()
            known = self._listings.get(path)
            if known is not None and self._suffices(known):
                return known.entries
            if known is None and self._is_denied(path):
                return ()
            flight, launched = self._join(path)
            patience_s = self._patience_s(known, flight)
        if launched:
            self._start(flight)
        return self._wait(flight, known, patience_s)

    def entry(self, path: str) -> Entry | None:
        """Return what is at a path; may ask the origin for the folder that it is in."""
        if not path:
            return Folder("")
        folder, _, name = path.rpartition("/")
        return find(self.children(folder), name)

    def ttl_s(self, path: str) -> float:
        """Return for how long from now the listing of a folder is shown without asking."""
        with self._lock:
            known = self._listings.get(path)
            if known is None:
                return 0.0
            until_s = max(known.until_s, self._outage.retry_at_s)
        return max(0.0, until_s - self._clock())

    def known(self) -> Iterator[Entry]:
        """Yield everything that was listed by this process or by those before it; asks nobody."""
        with self._lock:
            folders = self._listings.items()
        for _, entries in folders:
            yield from entries

    def require_root(self) -> None:
        """Raise what the origin says of the root; its silence only where nothing is known."""
        flight = self._ask_again("")
        with self._lock:
            known = self._listings.get("")
        self._wait(flight, known, self._patience_s(known, flight))
        if isinstance(flight.cause, NotFoundError):
            raise flight.cause

    def refresh(self, path: str = "") -> int:
        """Ask again for every known folder at and below a path; return how many were listed.

        When this returns, `on_change` has been told of all differences. Raises what kept it from
        finishing; what was listed before stays.
        """
        waiting: deque[Flight] = deque()
        listed = 0
        for folder in self._expire(path):
            if len(waiting) == _REFRESHED_AT_ONCE:
                listed += self._settled(waiting.popleft())
            with self._lock:
                gone = self._listings.get(folder) is None
            if not gone:  # else it went with a folder above it
                waiting.append(self._ask_again(folder))
        listed += sum(self._settled(flight) for flight in waiting)
        self._told()
        return listed

    def close(self) -> None:
        """Save the snapshot and wake everybody who waits; listings under way count no more."""
        with self._lock:
            self._closed = True
            for flight in self._flights.values():
                flight.land(error=LoadCancelled(f"{self.uri}: the mount is closed"))
            self._flights.clear()
        if self._snapshot is not None:
            self._snapshot.close()

    # What is known. The lock is held.

    def _check_open(self) -> None:
        if self._closed:
            raise LoadCancelled(f"{self.uri}: the mount is closed")

    def _suffices(self, known: Listing) -> bool:
        now_s = self._clock()
        if now_s < known.until_s or len(self._flights) >= MAX_FLIGHTS:
            return True
        probing = self._probe is not None and not self._probe.landed.is_set()
        return self._outage.is_on and (probing or now_s < self._outage.retry_at_s)

    def _is_denied(self, path: str) -> bool:
        """Tell whether the folder above is fresh and knows of no such folder."""
        if not is_path(path):
            return True  # must never reach an origin: `..` leads out of a local root
        if not path:
            return False
        folder, _, name = path.rpartition("/")
        above = self._listings.get(folder)
        if above is None or not self._suffices(above):
            return False
        return not isinstance(find(above.entries, name), Folder)

    def _join(self, path: str) -> tuple[Flight, bool]:
        flight = self._flights.get(path)
        if flight is not None:
            return flight, False
        flight = self._flights[path] = Flight(path)
        if self._outage.is_on:
            self._probe = flight
        return flight, True

    def _patience_s(self, known: Listing | None, flight: Flight) -> float:
        if known is None:
            return self._deadline_s
        return 0.0 if self._outage.is_on else STALE_PATIENCE_S - flight.age_s()

    # Asking. The lock is not held.

    def _wait(self, flight: Flight, known: Listing | None, patience_s: float) -> tuple[Entry, ...]:
        if flight.landed.wait(max(0.0, patience_s)):
            return flight.result()
        if known is not None:
            return known.entries
        raise self._too_late(flight)

    def _too_late(self, flight: Flight) -> UnavailableError:
        uri = self._lister.uri(flight.path)
        return UnavailableError(f"{uri}: no listing within {self._deadline_s:g} s")

    def _start(self, flight: Flight) -> None:
        try:
            thread = threading.Thread(
                target=self._run, args=(flight,), name="weightstream-listing", daemon=True
            )
            thread.start()
        except RuntimeError as error:  # no more threads
            self._failed(flight, UnavailableError(f"{self.uri}: cannot list: {error}"))
            self._telling.discard(flight)
            flight.settled.set()

    def _ask_again(self, path: str) -> Flight:
        """Ask for a folder now; an answer that is under way may be older than that."""
        with self._lock:
            self._check_open()
            self._flights.pop(path, None)
            flight, _ = self._join(path)
        self._start(flight)
        return flight

    def _run(self, flight: Flight) -> None:
        try:
            found = self._lister.list(flight.path)
        except Exception as error:
            changes = self._failed(flight, error)
        else:
            changes = self._listed(flight, found)
        try:
            if changes:
                self._on_change(changes)
        finally:
            with self._lock:
                self._telling.discard(flight)
            flight.settled.set()

    # Answers.

    def _listed(self, flight: Flight, found: tuple[Entry, ...]) -> Sequence[Change]:
        with self._lock:
            known = self._listings.get(flight.path)
        old = known.entries if known is not None else ()
        entries, changes = reconcile(flight.path, old, found)
        lost = lost_folders(old, entries)
        with self._lock:
            counts = self._land(flight, entries)
            ended = self._outage.answered()
            if counts:
                self._keep(flight.path, entries, lost, changed=known is None or entries is not old)
        self._tell(ended)
        return changes if counts and known is not None else ()

    def _land(
        self,
        flight: Flight,
        entries: tuple[Entry, ...] = (),
        error: Exception | None = None,
        cause: Exception | None = None,
    ) -> bool:
        """Give the answer to those who wait; return whether it counts for those who come."""
        counts = self._flights.get(flight.path) is flight
        if counts:
            del self._flights[flight.path]
            self._telling.add(flight)
        flight.land(entries, error, cause)
        return counts

    def _keep(
        self, path: str, entries: tuple[Entry, ...], lost: Iterable[str], *, changed: bool
    ) -> None:
        self._listings.put(path, Listing(entries, self._clock() + self._ttl_s))
        self._listings.drop_below(lost)
        if changed and self._snapshot is not None:
            self._snapshot.touch()

    def _failed(self, flight: Flight, error: Exception) -> Sequence[Change]:
        if is_silence(error):
            self._silent(flight, error)
            return ()
        if not isinstance(error, WeightstreamError):
            log.error("%s: listing %r failed", self.uri, flight.path, exc_info=error)
        with self._lock:
            ended = self._outage.answered()
            known = self._listings.get(flight.path)
            old = known.entries if known is not None else ()
            gone = isinstance(error, NotFoundError)
            counts = self._land(flight, (), None if gone else error, error)
            if counts and gone:
                self._vanished(flight.path, old)
            elif counts and isinstance(error, AccessDeniedError):
                self._listings.drop_below([flight.path] if flight.path else [])
                self._listings.drop(flight.path)
        self._tell(ended)
        if not counts or not isinstance(error, NotFoundError | AccessDeniedError):
            return ()
        return reconcile(flight.path, old, ())[1]

    def _vanished(self, path: str, old: tuple[Entry, ...]) -> None:
        self._keep(path, (), lost_folders(old, ()), changed=bool(old))
        above = self._listings.get(path.rpartition("/")[0])
        if old and path and above is not None:
            above.expire()  # it still names the folder

    def _silent(self, flight: Flight, error: Exception) -> None:
        with self._lock:
            first = self._outage.failed(self._clock()) and not self._closed
        if first:  # said before anybody sees what is old
            log.warning("the origin is silent, folders are shown as listed before: %s", error)
        with self._lock:
            known = self._listings.get(flight.path)
            if known is not None:
                known.until_s = max(known.until_s, self._outage.retry_at_s)
                self._land(flight, known.entries, None, error)
            else:
                self._land(flight, (), error, error)

    def _tell(self, outage_ended: bool) -> None:
        if outage_ended:
            log.info("%s: the origin answers again", self.uri)

    # Refreshing.

    def _expire(self, path: str) -> list[str]:
        """Mark what is to be asked again; return it, folders before those in them."""
        with self._lock:
            self._check_open()
            folders = self._listings.below(path)
            while not folders and path:  # a file, or a folder that nobody knew until now
                path = path.rpartition("/")[0]
                folders = [path] if self._listings.get(path) is not None else []
            for flying in [flying for flying in self._flights if is_below(flying, path)]:
                del self._flights[flying]  # its answer may be older than this call
            for folder in folders:
                listing = self._listings.get(folder)
                assert listing is not None
                listing.expire()
        return folders

    def _settled(self, flight: Flight) -> bool:
        """Wait until a listing is told of; raise what went wrong, other than a refusal."""
        if not flight.settled.wait(self._deadline_s):
            raise self._too_late(flight)
        cause = flight.cause
        if cause is not None and (
            is_silence(cause) or not isinstance(cause, NotFoundError | AccessDeniedError)
        ):
            raise cause
        return True

    def _told(self) -> None:
        """Wait until the differences that earlier listings found are told of as well."""
        with self._lock:
            telling = list(self._telling)
        for flight in telling:
            flight.settled.wait(self._deadline_s)

    def _copy(self) -> Sequence[tuple[str, tuple[Entry, ...]]]:
        with self._lock:
            return self._listings.items()
