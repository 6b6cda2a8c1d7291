"""A BitTorrent v2 torrent of a model, made from hashes that were taken while it was read.

libtorrent makes one only from files on disk, so the dictionary of BEP 52 is written here. Its tree
has SHA-256 leaves of 16 KiB. Keeping them would take 0.2 % of the model in memory; what is kept of
a run of leaves, a *unit*, is the root of their subtree.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TypeAlias

LEAF_BYTES = 16 << 10
PIECE_BYTES = 1 << 20
"""Four or more to a chunk make a swarm finish at 1.17x of its bound instead of 1.33x."""

HASH_BYTES = 32
_ZERO = bytes(HASH_BYTES)

Bencoded: TypeAlias = "bytes | int | list[Bencoded] | Mapping[bytes, Bencoded]"


def unit_bytes(chunk_size: int) -> int:
    """Return the largest subtree that never crosses a chunk; a power of two.

    A multiple of `LEAF_BYTES` if the chunk size is one.
    """
    return gcd(chunk_size, PIECE_BYTES)


def leaves_of(data: memoryview) -> list[bytes]:
    """Return the SHA-256 of every 16 KiB; the last one may be short."""
    sha256 = hashlib.sha256
    return [sha256(data[at : at + LEAF_BYTES]).digest() for at in range(0, len(data), LEAF_BYTES)]


def merkle_root(nodes: Sequence[bytes], width: int, pad: bytes = _ZERO) -> bytes:
    """Return the root over `nodes`, padded with `pad` to `width`, a power of two."""
    sha256 = hashlib.sha256
    level = list(nodes)
    while width > 1:
        if len(level) % 2:
            level.append(pad)
        level = [sha256(level[i] + level[i + 1]).digest() for i in range(0, len(level), 2)]
        pad = sha256(pad + pad).digest()
        width //= 2
    return level[0]


def subtree(leaves: Sequence[bytes], unit: int, file_bytes: int) -> bytes:
    """Return the root of one unit's leaves; a file of less than a unit has a smaller tree."""
    full = unit // LEAF_BYTES
    return merkle_root(leaves, full if file_bytes > unit else _power(len(leaves)))


@dataclass(frozen=True, slots=True)
class TorrentFile:
    """One file of a torrent."""

    path: str
    size: int
    root: bytes
    """The root of its tree; empty for an empty file."""
    layer: bytes
    """The roots of its pieces, one after the other; empty for a file of one piece."""


def torrent_file(path: str, size: int, units: Sequence[bytes], unit: int) -> TorrentFile:
    """Return a file's part of the torrent, from the roots of its units in file order."""
    if not size:
        return TorrentFile(path, 0, b"", b"")
    if size <= PIECE_BYTES:
        return TorrentFile(path, size, merkle_root(units, _power(len(units)), _zeros(unit)), b"")
    each = PIECE_BYTES // unit
    pieces = [
        merkle_root(units[at : at + each], each, _zeros(unit)) for at in range(0, len(units), each)
    ]
    root = merkle_root(pieces, _power(len(pieces)), _zeros(PIECE_BYTES))
    return TorrentFile(path, size, root, b"".join(pieces))


def _zeros(count: int) -> bytes:
    """Return the root of a subtree of nothing but padding, over `count` bytes."""
    node = _ZERO
    while count > LEAF_BYTES:
        node, count = hashlib.sha256(node + node).digest(), count // 2
    return node


def _power(count: int) -> int:
    """Return the smallest power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()


def encode_torrent(
    name: str, files: Iterable[TorrentFile], web_seed: str | None, *, private: bool
) -> bytes:
    """Return the torrent. `web_seed` is the URL of the folder that holds the folder `name`.

    A private torrent is announced to trackers only, never to the DHT.
    """
    tree: dict[bytes, Bencoded] = {}
    layers: dict[bytes, Bencoded] = {}
    for file in files:
        _put(tree, file)
        if file.layer:
            layers[file.root] = file.layer
    info: dict[bytes, Bencoded] = {
        b"file tree": tree,
        b"meta version": 2,
        b"name": name.encode(),
        b"piece length": PIECE_BYTES,
    }
    if private:
        info[b"private"] = 1
    content: dict[bytes, Bencoded] = {b"info": info, b"piece layers": layers}
    if web_seed is not None:
        content[b"url-list"] = [web_seed.encode()]
    return bencode(content)


def _put(tree: dict[bytes, Bencoded], file: TorrentFile) -> None:
    *folders, name = file.path.encode().split(b"/")
    for folder in folders:
        below = tree.setdefault(folder, {})
        assert isinstance(below, dict)  # no path is a file and a folder: see parse.py
        tree = below
    entry: dict[bytes, Bencoded] = {b"length": file.size}
    if file.size:
        entry[b"pieces root"] = file.root
    tree[name] = {b"": entry}


def bencode(value: Bencoded) -> bytes:
    """Return a value as BitTorrent writes it."""
    parts: list[bytes] = []
    _bencode(value, parts)
    return b"".join(parts)


def _bencode(value: Bencoded, parts: list[bytes]) -> None:
    if isinstance(value, int):
        parts.append(b"i%de" % value)
    elif isinstance(value, Mapping):
        parts.append(b"d")
        for key in sorted(value):
            _bencode(key, parts)
            _bencode(value[key], parts)
        parts.append(b"e")
    elif isinstance(value, list):
        parts.append(b"l")
        for item in value:
            _bencode(item, parts)
        parts.append(b"e")
    else:
        parts += (b"%d:" % len(value), value)
