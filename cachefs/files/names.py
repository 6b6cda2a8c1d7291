"""Which of an origin's names a mount may show. Pure.

Object keys are any bytes; names of files are not. What cannot be a name is left out, never changed:
a changed name would be found under no key, and might hide another. A newline, a tab, a quote are
names like any other. Where a key is both a file (`a`) and a folder (`a/b`), the folder is shown,
because what is below it could not be reached otherwise.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from weightstream.cachefs.files.entries import Entry, File, Folder, join
from weightstream.cachefs.origin import FolderListing, Listed

MAX_NAME_BYTES = 255  # NAME_MAX of Linux; the kernel refuses longer ones before it asks us
MAX_SIZE = (1 << 63) - 1  # an off_t


@dataclass(frozen=True, slots=True)
class Hidden:
    """A name that is not shown, and why."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name[:80]!a} ({self.why})"


@dataclass(frozen=True, slots=True)
class Sifted:
    """What of one listing is shown, sorted by name, and what is not."""

    entries: tuple[Entry, ...]
    hidden: tuple[Hidden, ...]


def flaw(name: str) -> str:
    """Return why a mount cannot show a name; nothing where it can."""
    if name in _SPECIAL:
        return _SPECIAL[name]
    if "/" in name:
        return "it holds a slash"
    if "\0" in name:
        return "it holds a NUL"
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "it is not UTF-8"
    return f"it is longer than {MAX_NAME_BYTES} bytes" if length > MAX_NAME_BYTES else ""


_SPECIAL = {"": "it is empty", ".": "it means the folder itself", "..": "it leads up"}


def is_path(path: str) -> bool:
    """Tell whether every component of a path could be a name; the root's path is empty."""
    return not path or not any(map(flaw, path.split("/")))


def sift(folder: str, listing: FolderListing, *, web: bool) -> Sifted:
    """Return what a mount shows of a folder."""
    shown: dict[str, Entry] = {}
    hidden: list[Hidden] = []
    for entry in _candidates(folder, listing, web):
        if isinstance(entry, Hidden):
            hidden.append(entry)
        elif entry.name not in shown:
            shown[entry.name] = entry
        else:
            taken = isinstance(shown[entry.name], Folder)
            hidden.append(Hidden(entry.name, _FOLDER_WINS if taken else _TWICE))
    return Sifted(tuple(shown[name] for name in sorted(shown)), tuple(hidden))


_FOLDER_WINS = "a folder has the same name"
_TWICE = "another file has the same name"


def _candidates(folder: str, listing: FolderListing, web: bool) -> Iterator[Entry | Hidden]:
    for name in listing.folders:
        why = flaw(name)
        yield Hidden(name, why) if why else Folder(join(folder, name))
    for listed in listing.files:
        yield _file(folder, listed, web)


def _file(folder: str, listed: Listed, web: bool) -> File | Hidden:
    name = name_in_uri(listed.blob.uri, web=web)
    why = flaw(name)
    if not why and not 0 <= listed.blob.size <= MAX_SIZE:
        why = f"no file has {str(listed.blob.size)[:24]} bytes"
    if why:
        return Hidden(name, why)
    return File(join(folder, name), listed.blob, listed.modified_ns or 0)


def name_in_uri(uri: str, *, web: bool) -> str:
    """Return the name that the last component of a URI stands for."""
    if not web:
        return uri.rpartition("/")[2]
    return unquote(urlsplit(uri).path.rpartition("/")[2], errors="surrogateescape")


def uri_of(root: str, path: str, *, web: bool) -> str:
    """Return the URI of a path under a root."""
    if not path:
        return root
    return f"{root.removesuffix('/')}/{quote(path) if web else path}"


def some(hidden: Iterable[Hidden], count: int = 3) -> str:
    """Return the first few in words."""
    words = [str(name) for name in hidden]
    more = f" and {len(words) - count} more" if len(words) > count else ""
    return ", ".join(words[:count]) + more
