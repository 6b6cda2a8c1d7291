"""Pieces cover exactly what was wanted, each byte once, never across a chunk border."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.fetch.ranges import cut, grow, merge

EXTENTS = st.lists(
    st.tuples(st.integers(0, 500), st.integers(0, 80)).map(lambda t: Extent(t[0], t[0] + t[1])),
    max_size=12,
)


def covered(extents: list[Extent]) -> set[int]:
    return {byte for extent in extents for byte in range(extent.start, extent.stop)}


@given(EXTENTS, st.integers(1, 64))
def test_pieces_cover_the_wanted_bytes_once(extents: list[Extent], chunk_bytes: int) -> None:
    pieces = list(cut(extents, chunk_bytes))
    assert covered(pieces) == covered(extents)
    assert sum(len(piece) for piece in pieces) == len(covered(extents))


@given(EXTENTS, st.integers(1, 64))
def test_pieces_never_cross_a_chunk_border(extents: list[Extent], chunk_bytes: int) -> None:
    for piece in cut(extents, chunk_bytes):
        assert piece.start // chunk_bytes == (piece.stop - 1) // chunk_bytes


def test_pieces_keep_the_order_that_was_asked_for() -> None:
    pieces = list(cut([Extent(16, 24), Extent(0, 8)], 8))
    assert pieces == [Extent(16, 24), Extent(0, 8)]


def test_adjoining_extents_make_whole_chunks() -> None:
    assert list(cut([Extent(0, 3), Extent(3, 8)], 8)) == [Extent(0, 8)]


@given(EXTENTS, st.integers(0, 20))
def test_merged_extents_are_sorted_and_apart(extents: list[Extent], gap: int) -> None:
    merged = merge(extents, gap)
    assert covered(extents) <= covered(merged)
    for left, right in pairwise(merged):
        assert right.start - left.stop > gap


@given(st.integers(1, 400), st.integers(1, 50), st.data())
def test_grown_extents_end_on_borders_or_the_file(
    size: int, chunk: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    grown = grow(Extent(start, stop), chunk, size)
    assert grown.start <= start < stop <= grown.stop
    assert grown.start % chunk == 0
    assert grown.stop % chunk == 0 or grown.stop == size
