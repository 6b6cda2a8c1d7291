"""Pure arithmetic: from the extents that a reader wants to the pieces that are fetched."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from weightstream.cachefs.blob import Extent


def merge(extents: Iterable[Extent], gap_bytes: int = 0) -> list[Extent]:
    """Return sorted, disjoint extents; neighbours at most `gap_bytes` apart become one."""
    merged: list[Extent] = []
    for extent in sorted(e for e in extents if len(e) > 0):
        if merged and extent.start <= merged[-1].stop + gap_bytes:
            last = merged.pop()
            extent = Extent(last.start, max(last.stop, extent.stop))
        merged.append(extent)
    return merged


def grow(extent: Extent, chunk_bytes: int, size_bytes: int) -> Extent:
    """Return the extent grown to the borders of the chunks that it touches."""
    start = extent.start // chunk_bytes * chunk_bytes
    stop = -(-extent.stop // chunk_bytes) * chunk_bytes
    return Extent(start, min(stop, size_bytes))


def cut(extents: Sequence[Extent], chunk_bytes: int) -> Iterator[Extent]:
    """Yield the extents cut at chunk borders, each byte once, in the order they were asked for.

    Extents that overlap earlier ones lose what was asked for already. Neighbours are merged first,
    so that a chunk wanted by several adjoining extents is one piece and can be kept whole.
    """
    taken = set[int]()
    union = merge(extents)
    for extent in extents:
        for piece in _pieces(extent, union, chunk_bytes):
            if piece.start not in taken:
                taken.add(piece.start)
                yield piece


def _pieces(extent: Extent, union: Sequence[Extent], chunk_bytes: int) -> Iterator[Extent]:
    if len(extent) == 0:
        return
    home = union[bisect_right(union, extent.start, key=lambda u: u.start) - 1]
    position = extent.start // chunk_bytes * chunk_bytes
    while position < extent.stop:
        yield Extent(max(position, home.start), min(position + chunk_bytes, home.stop))
        position += chunk_bytes
