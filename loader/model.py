"""Pure choice: which files of a listing are the model's weights.

The index decides where there is one. Without it, every `*.safetensors` directly under the prefix
is a shard, but for `consolidated*.safetensors`, which repeat a model published in shards too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob
from weightstream.errors import FormatError, NotFoundError, UsageError
from weightstream.loader.header import shown
from weightstream.loader.index import INDEX_SUFFIX, Index

SUFFIX = ".safetensors"
_PREFERRED_INDEX = "model" + INDEX_SUFFIX
_DUPLICATE = "consolidated"
_NUMBERED = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})\.safetensors")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files of one model, before the index is read."""

    uri: str
    listing: tuple[Blob, ...]
    index: Blob | None
    shards: tuple[Blob, ...]
    """What to load when there is no index; with one, `select_shards` says."""


def model_root(uri: str) -> str:
    """Return the prefix to list for `uri`: an index stands for its folder."""
    return uri.rsplit("/", 1)[0] if uri.endswith(INDEX_SUFFIX) else uri


def choose_files(uri: str, listing: Sequence[Blob]) -> ModelFiles:
    """Return the model's files in a listing of `model_root(uri)`."""
    blobs = tuple(listing)
    root = model_root(uri)
    if len(blobs) == 1 and blobs[0].uri == root:
        return ModelFiles(uri, blobs, None, blobs)
    names = {_relative(root, blob): blob for blob in blobs}
    top = {name: blob for name, blob in names.items() if "/" not in name}
    index = _choose_index(uri, top)
    shards = _without_duplicates({n: b for n, b in top.items() if n.endswith(SUFFIX)})
    if index is None:
        if not shards:
            raise NotFoundError(_nothing_here(uri, names))
        _check_numbers(uri, list(shards))
    return ModelFiles(uri, blobs, index, tuple(shards.values()))


def select_shards(files: ModelFiles, index: Index) -> tuple[Blob, ...]:
    """Return the files that the index names, in the order of their names."""
    names = {index.file_of(blob): blob for blob in files.listing}
    wanted = sorted(set(index.weight_map.values()))
    for name in wanted:
        if name not in names:
            raise FormatError(f"{index.blob.uri}: index names {shown(name)}, which is not there")
    return tuple(names[name] for name in wanted)


def _relative(root: str, blob: Blob) -> str:
    return blob.uri.removeprefix(root.rstrip("/") + "/")


def _choose_index(uri: str, top: dict[str, Blob]) -> Blob | None:
    if uri.endswith(INDEX_SUFFIX):
        named = top.get(uri.rsplit("/", 1)[-1])
        if named is None:
            raise NotFoundError(f"{uri}: no such index")
        return named
    found = [name for name in top if name.endswith(INDEX_SUFFIX)]
    if len(found) > 1 and _PREFERRED_INDEX not in found:
        raise UsageError(f"{uri}: several indexes, name one of them: {', '.join(sorted(found))}")
    if _PREFERRED_INDEX in found:
        return top[_PREFERRED_INDEX]
    return top[found[0]] if found else None


def _without_duplicates(shards: dict[str, Blob]) -> dict[str, Blob]:
    kept = {name: b for name, b in shards.items() if not name.startswith(_DUPLICATE)}
    return kept or shards


def _check_numbers(uri: str, names: list[str]) -> None:
    """Refuse a set like 1-of-3, 3-of-3: a tensor would be missing without a word."""
    matches = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    for stem, count in {(m[1], m[3]) for m in matches}:
        present = {int(m[2]) for m in matches if (m[1], m[3]) == (stem, count)}
        missing = [n for n in range(1, min(int(count), 100_000) + 1) if n not in present]
        if missing:
            name = f"{stem}-{missing[0]:0{len(count)}}-of-{count}{SUFFIX}"
            raise FormatError(f"{uri}: {name} is missing among its {count} shards")


def _nothing_here(uri: str, names: dict[str, Blob]) -> str:
    deeper = sorted({n.rsplit("/", 1)[0] for n in names if n.endswith(SUFFIX)})
    if deeper:
        return f"{uri}: no *{SUFFIX} directly here; some are in {', '.join(deeper[:5])}"
    return f"{uri}: no *{SUFFIX} among its {len(names)} files"
