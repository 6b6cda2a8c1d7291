"""What to fetch beyond what a read asks for: pure functions, decided by numbers alone.

Stock loaders map a file and touch it page by page; through a mount each touch becomes a read of the
kernel's choosing, and the file arrives at a twentieth of what the link can do. So once a load has
begun, the whole file is fetched from the point where it began, and the shards behind it: Alluxio,
vLLM, TensorRT-LLM and transformers all ended there. But not before: `ls`, a look at a header and a
scan over the metadata of a hundred models must not pull a hundred models.
"""

import re
from collections.abc import Sequence

_SMALL_BYTES = 64 << 20
"""A file up to this size is fetched whole at its first read: asking for its rest later costs more
than it saves."""

_LOOK_CHUNKS = 2
"""A look at a header touches these many chunks: the kernel reads 16 MiB around a first fault."""

_SHARD = re.compile(r"(?P<stem>.*?)-?\d{5}-of-(?P<count>\d{5})(?P<suffix>\..*)?")


def load_has_begun(size_bytes: int, touched_chunks: int, deepest_chunk: int) -> bool:
    """Say whether the reads of a file so far look like a load of all of it."""
    if size_bytes <= _SMALL_BYTES:
        return touched_chunks > 0
    return touched_chunks > _LOOK_CHUNKS or deepest_chunk > _LOOK_CHUNKS


def fill_order(n_chunks: int, first: int, recorded: Sequence[int] = ()) -> list[int]:
    """Return all chunks in the order in which to fetch them.

    As an earlier load touched them, from `first` on; else in file order from `first` to the end,
    then what lies before it.
    """
    known = list(dict.fromkeys(chunk for chunk in recorded if 0 <= chunk < n_chunks))
    at = known.index(first) if first in known else len(known)
    plain = [*range(first, n_chunks), *range(first)]
    return list(dict.fromkeys([*known[at:], *plain])) if at < len(known) else plain


def shards_behind(name: str, names: Sequence[str], recorded: Sequence[str] = ()) -> list[str]:
    """Return which of `names` a load of `name` will read next, in that order.

    The shards of the same checkpoint: as an earlier load opened them, else by number, from the one
    after `name` on, then those before it. Nothing for a file that is not a shard.
    """
    mine = _SHARD.fullmatch(name)
    if mine is None:
        return []
    family = sorted(other for other in names if _same_family(mine, other))
    known = list(dict.fromkeys(other for other in recorded if other in family))
    if name in known:
        at = known.index(name)
        ordered = [*known[at + 1 :], *known[:at], *family]
    else:
        at = family.index(name) if name in family else -1
        ordered = [*family[at + 1 :], *family[: max(0, at)]]
    return [other for other in dict.fromkeys(ordered) if other != name]


def _same_family(mine: re.Match[str], other: str) -> bool:
    match = _SHARD.fullmatch(other)
    return match is not None and all(
        match[part] == mine[part] for part in ("stem", "count", "suffix")
    )
