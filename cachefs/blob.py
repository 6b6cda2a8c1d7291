"""The two nouns that every part of weightstream speaks of: blob and extent."""

from dataclasses import dataclass
from functools import lru_cache

from blake3 import blake3


@dataclass(frozen=True, slots=True)
class Blob:
    """One immutable version of one file.

    `uri` never holds credentials. `version` is the origin's own word for this version (ETag without
    quotes, generation, commit, mtime); it is empty where the origin has none, and such a blob is
    never kept in the store, because nothing would tell when it is stale.
    """

    uri: str
    size: int
    version: str

    @property
    def id(self) -> str:
        """Return 32 hex digits that name this blob on disk and between peers."""
        return _id_of(self.uri, self.version, self.size)

    @property
    def name(self) -> str:
        """Return the last component of the URI."""
        return self.uri.rsplit("/", 1)[-1]

    def whole(self) -> "Extent":
        """Return the extent that covers the file."""
        return Extent(0, self.size)


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """Bytes [start, stop) of a blob."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"bytes {self.start}-{self.stop - 1}"


@lru_cache(maxsize=1024)
def _id_of(uri: str, version: str, size: int) -> str:
    """Return a blob's id; remembered, for a mount asks several times in every read."""
    return blake3(f"{uri}\0{version}\0{size}".encode()).hexdigest(length=16)
