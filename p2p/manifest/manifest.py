"""What a model is, byte for byte: its files, their versions, and a BLAKE3 for every chunk.

The root hash is over a canonical encoding, and a signature is over the root hash, so that one
signature covers everything. Neither covers where the model lies: a manifest may be kept elsewhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from weightstream.cachefs.blob import Blob, Extent
from weightstream.p2p.manifest.paths import file_path

FORMAT = 1
DIGEST_BYTES = 32

_MAGIC = b"weightstream manifest\0"


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file as it was when the model was published."""

    path: str
    """Relative to the model's URI, with slashes, never percent-encoded."""
    size: int
    version: str
    """The origin's word for this version, as in `Blob.version`."""
    digests: bytes = field(repr=False)
    """The BLAKE3 of every chunk, 32 bytes each, in file order."""
    crc64nvme: int | None = None
    """Of the whole file, where it was computed."""

    def digest(self, i: int) -> bytes:
        """Return the BLAKE3 of chunk `i`."""
        return self.digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The published list of a model's files, versions and chunk hashes."""

    chunk_size: int
    files: tuple[ManifestFile, ...]
    """Sorted by path."""
    signature: bytes | None = None
    """Ed25519, see signing.py."""
    uri: str = field(default="", compare=False)
    """The model that it is about: where it was asked for, not what it says of itself."""
    _by_path: dict[str, ManifestFile] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_path", {file.path: file for file in self.files})

    @property
    def size(self) -> int:
        """Return the bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def root(self) -> bytes:
        """Return the BLAKE3 over the canonical encoding of everything but the signature."""
        hasher = blake3(_MAGIC)
        for part in _canonical(self.chunk_size, self.files):
            hasher.update(part)
        return hasher.digest()

    def file(self, path: str) -> ManifestFile | None:
        """Return the file at a path."""
        return self._by_path.get(path)

    def file_of(self, blob: Blob) -> ManifestFile | None:
        """Return the entry of exactly this blob: its path, its size and its version."""
        path = file_path(self.uri, blob.uri)
        file = self._by_path.get(path) if path is not None else None
        if file is None or (file.size, file.version) != (blob.size, blob.version):
            return None
        return file

    def digest(self, blob: Blob, i: int) -> bytes | None:
        """Return the BLAKE3 of chunk `i`; None for another version, or a file not listed."""
        file = self.file_of(blob)
        if file is None or not 0 <= i < chunk_count(file.size, self.chunk_size):
            return None
        return file.digest(i)

    def chunks(self, file: ManifestFile) -> Iterator[tuple[int, Extent]]:
        """Yield number and extent of every chunk of a file."""
        for i in range(chunk_count(file.size, self.chunk_size)):
            start = i * self.chunk_size
            yield i, Extent(start, min(start + self.chunk_size, file.size))


def chunk_count(size: int, chunk_size: int) -> int:
    """Return how many chunks a file of `size` bytes has."""
    return -(-size // chunk_size)


def _canonical(chunk_size: int, files: Sequence[ManifestFile]) -> Iterator[bytes]:
    """Yield every field with a length before it where it has none by itself."""
    yield _number(FORMAT) + _number(chunk_size) + _number(len(files))
    for file in files:
        for text in (file.path.encode(), file.version.encode()):
            yield _number(len(text)) + text
        crc = b"\0" if file.crc64nvme is None else b"\1" + _number(file.crc64nvme)
        yield _number(file.size) + crc + _number(len(file.digests))
        yield file.digests


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")
