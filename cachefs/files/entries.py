"""What a mount shows: files and folders, and how two listings of one folder differ. Pure."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias

from weightstream.cachefs.blob import Blob


@dataclass(frozen=True, slots=True)
class File:
    """One file of a mount: a path, and the version that is there now."""

    path: str
    """Relative to the mount's root: `llama/model.safetensors`."""
    blob: Blob
    modified_ns: int
    """Wall clock; 0 when unknown."""

    @property
    def name(self) -> str:
        """Return the last component."""
        return self.path.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """Return the path of the folder that it is in; empty for the root."""
        return self.path.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class Folder:
    """One folder of a mount; the root's path is empty."""

    path: str

    @property
    def name(self) -> str:
        """Return the last component."""
        return self.path.rpartition("/")[2]

    @property
    def folder(self) -> str:
        """Return the path of the folder that it is in; empty for the root and what lies in it."""
        return self.path.rpartition("/")[0]


Entry: TypeAlias = File | Folder


@dataclass(frozen=True, slots=True)
class Change:
    """A name that is new, has vanished, or stands for another version or kind now."""

    folder: str
    name: str


def join(folder: str, name: str) -> str:
    """Return the path of a name in a folder."""
    return f"{folder}/{name}" if folder else name


def is_below(path: str, folder: str) -> bool:
    """Tell whether a path is the folder or lies in it."""
    return not folder or path == folder or path.startswith(f"{folder}/")


def find(entries: Sequence[Entry], name: str) -> Entry | None:
    """Return the entry of that name; the entries are sorted by name and lie in one folder."""
    at = bisect_left(entries, name, key=_NAME)
    return entries[at] if at < len(entries) and entries[at].name == name else None


_NAME = attrgetter("name")


def reconcile(
    folder: str, old: tuple[Entry, ...], new: tuple[Entry, ...]
) -> tuple[tuple[Entry, ...], tuple[Change, ...]]:
    """Return the entries that are there now, and the names for which that makes a difference.

    What did not change stays the same object, `old` itself if nothing did: whoever holds entries
    of an earlier listing shares them with this one.
    """
    before = {entry.name: entry for entry in old}
    entries: list[Entry] = []
    names: list[str] = []
    for entry in new:
        name = entry.name
        was = before.pop(name, None)
        entries.append(was if was is not None and was == entry else entry)
        if was is None or not _is_same(was, entry):
            names.append(name)
    names += before
    same = len(old) == len(entries) and all(a is b for a, b in zip(old, entries, strict=True))
    return (old if same else tuple(entries)), tuple(Change(folder, name) for name in sorted(names))


def _is_same(was: Entry, now: Entry) -> bool:
    if isinstance(was, File) and isinstance(now, File):
        return was.blob == now.blob
    return type(was) is type(now)


def lost_folders(old: Sequence[Entry], new: Sequence[Entry]) -> set[str]:
    """Return the paths of folders that were there and are none any more."""
    now = {entry.path for entry in new if isinstance(entry, Folder)}
    return {entry.path for entry in old if isinstance(entry, Folder)} - now
