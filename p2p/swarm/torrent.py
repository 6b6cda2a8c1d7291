"""A blob as a torrent without hashes, which every member makes alike before any byte is read.

A torrent's name in the swarm is the hash of its description. Before a blob was read nobody knows
the hashes of its pieces, so the description has zeros in their place, and a word that only members
can derive: HMAC of the cluster's secret over URI, version and size. libtorrent checks nothing then
(`disable_hash_checks`): that is the agent's work.

Before the blob lies a piece that nobody has, wants or writes: a torrent that is never whole.
libtorrent frees its tables of pieces when one is, and without hash checks that happens in the midst
of `add_piece`, which reads them again where a peer had sent a later block of the last piece: half
of the tests' runs crashed there.
"""

import hashlib
import hmac
from dataclasses import dataclass
from math import gcd

from weightstream.cachefs.blob import Blob, Extent
from weightstream.p2p.identity import PEER_NAME
from weightstream.p2p.manifest.torrent import PIECE_BYTES, Bencoded, bencode

LEAST_PIECE_BYTES = 16 << 10
"""What BitTorrent asks for in one request."""
FIRST_PIECE = 1
"""Where the blob begins in its torrent; before it is what nobody has."""
BLOB_FILE = 1
"""Which file of the torrent the blob is."""
_MOST_PIECES = (1 << 21) - FIRST_PIECE
"""What libtorrent takes; a torrent of more it refuses."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How a blob is cut: pieces never cross chunks."""

    size: int
    chunk_size: int

    @property
    def piece_bytes(self) -> int:
        """Return 1 MiB, or less where chunks are smaller or odd."""
        return gcd(self.chunk_size, PIECE_BYTES)

    @property
    def n_pieces(self) -> int:
        """Return how many pieces there are."""
        return -(-self.size // self.piece_bytes)

    @property
    def can_be_carried(self) -> bool:
        """Say whether BitTorrent can have such pieces, and so many."""
        return self.piece_bytes >= LEAST_PIECE_BYTES and self.n_pieces <= _MOST_PIECES

    def piece(self, i: int) -> Extent:
        """Return the bytes that piece `i` covers."""
        start = i * self.piece_bytes
        return Extent(start, min(start + self.piece_bytes, self.size))

    def pieces(self, chunk: int) -> range:
        """Return the pieces of a chunk."""
        start = chunk * self.chunk_size
        stop = min(start + self.chunk_size, self.size)
        return range(start // self.piece_bytes, -(-stop // self.piece_bytes))

    def chunk(self, piece: int) -> int:
        """Return the chunk that a piece is part of."""
        return piece * self.piece_bytes // self.chunk_size


def describe(blob: Blob, shape: Shape, key: bytes) -> bytes:
    """Return the torrent's file. Its name is the certificates' name: libtorrent compares."""
    word = hmac.digest(key, f"{blob.uri}\0{blob.version}\0{blob.size}".encode(), hashlib.sha256)
    files: Bencoded = [
        {b"length": shape.piece_bytes, b"path": [b"nobody has it"]},
        {b"length": blob.size, b"path": [b"blob"]},
    ]
    info: dict[bytes, Bencoded] = {
        b"files": files,
        b"name": PEER_NAME.encode(),
        b"piece length": shape.piece_bytes,
        b"pieces": bytes(20 * (FIRST_PIECE + shape.n_pieces)),
        b"private": 1,
        b"x-weightstream": word.hex().encode(),
    }
    return bencode({b"info": info})
