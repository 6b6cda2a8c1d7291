"""The folders that a tree knows: what was in them, and until when that is taken for granted.

Not thread-safe: the tree's lock guards it. A file costs 0.6 kB (measured), so the number of
entries is bounded, and folders listed longest ago are forgotten first; they are listed again when
somebody asks.
"""

from collections.abc import Iterable, Iterator
from math import inf

from weightstream.cachefs.files.entries import Entry, is_below

MAX_ENTRIES = 300_000


class Listing:
    """One folder as it was listed last."""

    __slots__ = ("entries", "until_s")

    def __init__(self, entries: tuple[Entry, ...], until_s: float) -> None:
        self.entries = entries
        self.until_s = until_s
        """When it must be asked for again; minus infinity: at once."""

    def expire(self) -> None:
        """Have it asked for again; it stays what is shown when nobody answers."""
        self.until_s = -inf


class Listings:
    """Listings by path, the one that was put longest ago first."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._by_path: dict[str, Listing] = {}
        self._count = 0

    def get(self, path: str) -> Listing | None:
        """Return what is known of a folder."""
        return self._by_path.get(path)

    def put(self, path: str, listing: Listing) -> None:
        """Keep a listing; forget old ones when that makes too many."""
        self.drop(path)
        self._by_path[path] = listing
        self._count += _weight(listing)
        while self._count > self._max_entries and len(self._by_path) > 1:
            self.drop(next(iter(self._by_path)))

    def drop(self, path: str) -> Listing | None:
        """Forget one folder."""
        listing = self._by_path.pop(path, None)
        if listing is not None:
            self._count -= _weight(listing)
        return listing

    def drop_below(self, folders: Iterable[str]) -> None:
        """Forget these folders and everything in them."""
        gone = set(folders)
        if not gone:
            return
        for path in [path for path in self._by_path if any(map(gone.__contains__, _above(path)))]:
            self.drop(path)

    def below(self, folder: str) -> list[str]:
        """Return the known paths at and below a folder, each after the folder that it is in."""
        found = [path for path in self._by_path if is_below(path, folder)]
        return sorted(found, key=lambda path: (path.count("/") + bool(path), path))

    def items(self) -> list[tuple[str, tuple[Entry, ...]]]:
        """Return every known folder with its entries."""
        return [(path, listing.entries) for path, listing in self._by_path.items()]

    def __len__(self) -> int:
        return self._count


def _weight(listing: Listing) -> int:
    return len(listing.entries) + 1  # an empty folder costs memory too


def _above(path: str) -> Iterator[str]:
    """Yield a path and those of the folders around it."""
    while path:
        yield path
        path = path.rpartition("/")[0]
