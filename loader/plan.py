"""Pure planning: which extents of which blobs become which tensors."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.ranges import merge
from weightstream.errors import FormatError, UsageError
from weightstream.loader.header import Header, TensorInfo, shown
from weightstream.loader.index import Index

GAP_BYTES = 64 << 10
"""Wanted extents closer than this are fetched as one: less than a round trip's worth of bytes."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the model with its header."""

    blob: Blob
    header: Header


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies."""

    blob: Blob
    info: TensorInfo

    @property
    def name(self) -> str:
        """Return the tensor's name."""
        return self.info.name


@dataclass(frozen=True, slots=True)
class Plan:
    """Every tensor to load, shard by shard, each by offset."""

    places: tuple[Place, ...]

    def by_blob(self) -> dict[Blob, list[Place]]:
        """Return the wanted tensors of each blob that holds any, by offset."""
        found: dict[Blob, list[Place]] = {}
        for place in self.places:
            found.setdefault(place.blob, []).append(place)
        return found


def make_plan(shards: Sequence[Shard], index: Index | None, names: frozenset[str] | None) -> Plan:
    """Return the plan; FormatError when index and files disagree, UsageError for unknown names."""
    homes = _homes(shards, index)
    if names is not None:
        check_names(names, homes)
        homes = {name: place for name, place in homes.items() if name in names}
    return Plan(tuple(homes.values()))


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that the model does not have."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        few = ", ".join(map(shown, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        raise UsageError(f"names: the model has no tensor {few}")


def holders(
    shards: Sequence[Blob], index: Index | None, names: frozenset[str] | None
) -> tuple[Blob, ...]:
    """Return the shards whose headers are needed to load `names`."""
    if index is None or names is None:
        return tuple(shards)
    check_names(names, index.weight_map)
    files = {index.weight_map[name] for name in names}
    return tuple(blob for blob in shards if index.file_of(blob) in files)


def wanted_extents(places: Iterable[Place]) -> tuple[Extent, ...]:
    """Return the extents to fetch for these tensors of one blob, close ones merged."""
    return tuple(merge((place.info.extent for place in places), GAP_BYTES))


def without(extents: Iterable[Extent], known: Extent) -> tuple[Extent, ...]:
    """Return the extents less the bytes of `known`, which are there already."""
    left = []
    for extent in extents:
        before = Extent(extent.start, min(extent.stop, known.start))
        after = Extent(max(extent.start, known.stop), extent.stop)
        left += [part for part in (before, after) if part.start < part.stop]
    return tuple(left)


def natural_order(places: Iterable[Place]) -> list[Place]:
    """Return the tensors as a model is built: layer 2 before layer 10."""
    return sorted(places, key=lambda place: _natural_key(place.name))


def _natural_key(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _homes(shards: Sequence[Shard], index: Index | None) -> dict[str, Place]:
    """Return each tensor's one place. The index decides; what it does not name is where it is."""
    homes: dict[str, Place] = {}
    weight_map: Mapping[str, str] = index.weight_map if index else {}
    for shard in shards:
        file = index.file_of(shard.blob) if index else ""
        for info in shard.header.tensors:
            if weight_map.get(info.name, file) == file:
                _add(homes, Place(shard.blob, info))
    if index is not None:
        _check_index(shards, index, homes)
    return homes


def _add(homes: dict[str, Place], place: Place) -> None:
    before = homes.setdefault(place.name, place)
    if before is not place:
        raise FormatError(
            f"{place.blob.uri}: tensor {shown(place.name)} is in {before.blob.name} too; "
            f"name one file to load it alone"
        )


def _check_index(shards: Sequence[Shard], index: Index, homes: Mapping[str, Place]) -> None:
    read = {index.file_of(shard.blob) for shard in shards}
    for name, file in index.weight_map.items():
        if file in read and name not in homes:
            raise FormatError(
                f"{index.blob.uri}: index puts tensor {shown(name)} in {shown(file)}, "
                f"which does not have it"
            )
