"""`weightstream status PATH`: how much of each file of a mount is here, as the mount says it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weightstream.cli.base import Cli, table
from weightstream.errors import MountError

if TYPE_CHECKING:
    from weightstream.cachefs.fuse.mount_table import Mounted

_PREFIX = "user.weightstream."


@dataclass(frozen=True, slots=True)
class MountedFile:
    """One file; `state` is `absent`, `partial`, `filling` or `complete`."""

    path: str
    uri: str
    version: str
    size_bytes: int
    stored_bytes: int
    state: str


@dataclass(frozen=True, slots=True)
class MountedReport:
    """The files of a path in a mount."""

    directory: str
    uri: str
    files: tuple[MountedFile, ...]


def mount_of(path: str) -> "Mounted | None":
    """Return the mount that holds what was given for a URI; None when it is none of a path."""
    from weightstream.cachefs.fuse import mount_table

    return None if "://" in path else mount_table.mount_of(path)


def show(cli: Cli, path: str, mounted: "Mounted") -> None:
    """Print the state of a file, or of every file under a folder."""
    from weightstream.settings import format_bytes

    try:
        files = tuple(_file(one) for one in _files(os.path.abspath(path)))
    except OSError as error:
        raise MountError(f"{error.filename or path}: {error.strerror}") from error
    report = MountedReport(mounted.directory, mounted.source, files)
    rows = (
        (file.path, format_bytes(file.size_bytes), _percent(file), file.state) for file in files
    )
    shown = table(("FILE", "SIZE", "STORED", ""), rows, right="SIZE STORED")
    where = f"{mounted.source} at {mounted.directory}"
    cli.emit(report, where, shown if files else "no files")


def _files(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(path, onerror=refuse):
        folders.sort()
        yield from (os.path.join(folder, name) for name in sorted(names))


def _file(path: str) -> MountedFile:
    def attribute(name: str) -> str:
        return os.getxattr(path, _PREFIX + name).decode(errors="replace")

    return MountedFile(
        path=path,
        uri=attribute("uri"),
        version=attribute("etag"),
        size_bytes=os.stat(path).st_size,
        stored_bytes=int(attribute("cached")),
        state=attribute("state"),
    )


def _percent(file: MountedFile) -> str:
    if file.state == "complete":
        return "100 %"
    return f"{min(99, 100 * file.stored_bytes // max(1, file.size_bytes))} %"
