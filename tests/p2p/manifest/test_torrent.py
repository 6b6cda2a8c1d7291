"""The torrent is what BEP 52 says, by a slow tree of its own and by libtorrent if it is there."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.models import random_bytes

from weightstream.p2p.manifest.torrent import (
    LEAF_BYTES,
    PIECE_BYTES,
    TorrentFile,
    bencode,
    encode_torrent,
    leaves_of,
    subtree,
    torrent_file,
    unit_bytes,
)

KIB, MIB = 1 << 10, 1 << 20
SIZES = (0, 1, 16 * KIB, 16 * KIB + 1, 100 * KIB, 256 * KIB, 600 * KIB, MIB - 1, MIB, MIB + 1)
LARGER = (2 * MIB, 3 * MIB + 5, 5 * MIB, 8 * MIB + 70 * KIB)


def hashed(path: str, data: bytes, chunk_size: int) -> TorrentFile:
    """Hash a file as it is hashed while it is read, unit by unit."""
    unit, view = unit_bytes(chunk_size), memoryview(data)
    units = [
        subtree(leaves_of(view[at : at + unit]), unit, len(data))
        for at in range(0, len(data), unit)
    ]
    return torrent_file(path, len(data), units, unit)


def slow_root(data: bytes) -> bytes:
    """Return the root of the file's tree, padded with zero leaves, as BEP 52 says it."""
    level = [
        hashlib.sha256(data[at : at + LEAF_BYTES]).digest()
        for at in range(0, len(data), LEAF_BYTES)
    ]
    while len(level) & (len(level) - 1):
        level.append(bytes(32))
    while len(level) > 1:
        level = [hashlib.sha256(level[i] + level[i + 1]).digest() for i in range(0, len(level), 2)]
    return level[0]


@pytest.mark.parametrize("chunk_size", [64 * KIB, 80 * KIB, 256 * KIB, MIB, 3 * MIB, 8 * MIB])
@pytest.mark.parametrize("size", [*SIZES[1:], *LARGER])
def test_root_is_that_of_the_whole_tree(size: int, chunk_size: int) -> None:
    data = random_bytes(size, f"torrent-{size}")
    file = hashed("a", data, chunk_size)
    assert file.root == slow_root(data)
    assert len(file.layer) == (32 * -(-size // PIECE_BYTES) if size > PIECE_BYTES else 0)


VALUES: Any = st.recursive(
    st.binary(max_size=9) | st.integers(-(2**62), 2**62),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=5), inner, max_size=4)
    ),
)


def test_libtorrent_reads_what_was_bencoded() -> None:
    lt = pytest.importorskip("libtorrent")

    @settings(deadline=None)
    @given(st.dictionaries(st.binary(max_size=5), VALUES, max_size=4))
    def check(value: Any) -> None:
        assert lt.bdecode(bencode(value)) == value

    check()


def files() -> dict[str, bytes]:
    """Return files of every kind of tree, in folders."""
    odd = (*SIZES, *LARGER)
    return {f"d{i % 3}/f {i}é.bin": random_bytes(size, f"f{i}") for i, size in enumerate(odd)}


@pytest.mark.parametrize("seed", [None, "http://127.0.0.1:1/models/"])
def test_libtorrent_makes_the_same_torrent(tmp_path: Path, seed: str | None) -> None:
    """Info hash and piece layers are those that libtorrent computes from the files."""
    lt = pytest.importorskip("libtorrent")
    content = files()
    for path, data in content.items():
        (tmp_path / "m" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / path).write_bytes(data)
    ours = encode_torrent(
        "m", [hashed(p, d, MIB) for p, d in sorted(content.items())], seed, private=False
    )
    listed = lt.list_files(str(tmp_path / "m"))
    made = lt.create_torrent(listed, PIECE_BYTES, flags=lt.create_torrent.v2_only)
    lt.set_piece_hashes(made, str(tmp_path))
    theirs = lt.bencode(made.generate())
    mine, reference = lt.bdecode(ours), lt.bdecode(theirs)
    tree, wanted = mine[b"info"][b"file tree"], reference[b"info"][b"file tree"]
    assert _without_attributes(wanted) == tree
    assert mine[b"piece layers"] == reference[b"piece layers"]
    assert mine.get(b"url-list") == (None if seed is None else [seed.encode()])


def _without_attributes(tree: Any) -> Any:
    """Drop what libtorrent notes of the files on its disk."""
    if b"" in tree:
        return {b"": {k: v for k, v in tree[b""].items() if k in (b"length", b"pieces root")}}
    return {name: _without_attributes(below) for name, below in tree.items()}


def test_libtorrent_loads_it() -> None:
    lt = pytest.importorskip("libtorrent")
    body = encode_torrent(
        "m", [hashed(p, d, 8 * MIB) for p, d in sorted(files().items())], None, private=True
    )
    info = lt.load_torrent_buffer(body).ti
    digest = hashlib.sha256(bencode(lt.bdecode(body)[b"info"])).hexdigest()
    assert str(info.info_hashes().v2) == digest
    assert info.priv()
    assert info.piece_length() == PIECE_BYTES
    loaded = {
        info.layout().file_path(i): info.layout().file_size(i)
        for i in range(info.layout().num_files())
        if not info.layout().file_flags(i) & lt.file_flags_t.flag_pad_file
    }
    assert loaded == {f"m/{path}": len(data) for path, data in files().items()}
