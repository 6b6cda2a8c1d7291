"""`weightstream ls`, `status`, `pin`, `unpin`, `evict`: what there is and what is kept."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table
from weightstream.cli.mounted import mount_of, show
from weightstream.errors import NotFoundError, StoreError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.cachefs.blob import Blob
    from weightstream.cachefs.store import BlobInfo, Store


@dataclass(frozen=True, slots=True)
class FileRow:
    """One file of a model, as the origin lists it and as far as the store has it."""

    uri: str
    size_bytes: int
    version: str
    stored_bytes: int
    complete: bool
    pinned: bool
    in_use: bool
    last_used_s: float | None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """The files of the store that share a folder."""

    uri: str
    files: int
    size_bytes: int
    stored_bytes: int
    complete: bool
    pinned: bool
    in_use: bool
    last_used_s: float


@dataclass(frozen=True, slots=True)
class ListReport:
    """What lies under a URI."""

    uri: str
    files: tuple[FileRow, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StatusReport:
    """The store, and what it has of each model or of one."""

    store: Path
    usage_bytes: int
    room_bytes: int
    models: tuple[ModelRow, ...]
    files: tuple[FileRow, ...]


@dataclass(frozen=True, slots=True)
class ChangeReport:
    """What a command changed in the store."""

    store: Path
    uris: tuple[str, ...]
    bytes: int


def stored_uris(incomplete: str) -> list[str]:
    """Complete a URI from the models in the store."""
    from weightstream.cachefs.store import Store
    from weightstream.settings import load_settings

    with Store.open(load_settings()) as store:
        found = {_folder(info.blob.uri) for info in store.blobs()}
    return sorted(uri for uri in found if uri.startswith(incomplete))


Uri = Annotated[str, typer.Argument(metavar="URI", help="A model or a file.")]
StoredUri = Annotated[
    str,
    typer.Argument(metavar="URI", help="A model or a file in it.", autocompletion=stored_uris),
]


def ls(cli: Cli, uri: Uri) -> None:
    """List a model's files at its origin, and how much of each the store has."""
    from weightstream.cachefs.origin import open_origin

    origin = open_origin(uri, cli.settings)
    try:
        listing = origin.list(uri)
    finally:
        origin.close()
    rows = _file_rows(listing, _stored(cli))
    report = ListReport(uri, rows, sum(row.size_bytes for row in rows))
    cli.emit(report, _files_table(rows), f"\n{_size(report.size_bytes)} in {len(rows)} files")


def status(
    cli: Cli,
    uri: Annotated[
        str | None,
        typer.Argument(
            metavar="[URI|PATH]", help="Show each file of this.", autocompletion=stored_uris
        ),
    ] = None,
) -> None:
    """Show what the store holds, or what is here of a model, a file, or a path in a mount."""
    mounted = mount_of(uri) if uri is not None else None
    if uri is not None and mounted is not None:
        show(cli, uri, mounted)
        return
    store = open_store(cli)
    infos = list(store.blobs())
    files = _files_under(store, infos, uri) if uri is not None else ()
    models = () if uri is not None else _model_rows(infos)
    report = StatusReport(store.path, store.usage_bytes(), store.room_bytes(), models, files)
    shown = _files_table(files) if uri is not None else _models_table(models)
    room = max(0, report.room_bytes)
    used = f"{_size(report.usage_bytes)} used, room for {_size(room)}"
    empty = not models and not files
    cli.emit(report, f"{store.path}: {used}", "nothing stored" if empty else shown)


def pin(cli: Cli, uri: StoredUri) -> None:
    """Keep a model from being evicted."""
    _pin(cli, uri, pinned=True)


def unpin(cli: Cli, uri: StoredUri) -> None:
    """Let a model be evicted again."""
    _pin(cli, uri, pinned=False)


def _pin(cli: Cli, uri: str, *, pinned: bool) -> None:
    store = open_store(cli)
    under = _under(store, uri)
    count = store.pin(uri, pinned)
    if not count:
        raise StoreError(f"nothing under {uri} is in the store {store.path}")
    report = ChangeReport(store.path, tuple(i.blob.uri for i in under), _present(under))
    done = "pinned" if pinned else "unpinned"
    cli.emit(report, f"{done} {count} files, {_size(report.bytes)}")


def evict(
    cli: Cli,
    uri: Annotated[
        str | None,
        typer.Argument(
            metavar="[URI]", help="Remove this model or file.", autocompletion=stored_uris
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove everything that is not in use, pinned or not.")
    ] = False,
    free: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Remove the least recently used until SIZE would fit."),
    ] = None,
) -> None:
    """Remove models from the store; without arguments what is over its limits."""
    from weightstream.settings import parse_bytes

    if sum((uri is not None, everything, free is not None)) > 1:
        raise UsageError("give one of URI, --all and --free")
    needed = parse_bytes(free) if free is not None else 0
    if not isinstance(needed, int):
        raise UsageError(f"bad --free {free!r}: it is a size in bytes, such as 8GiB")
    store = open_store(cli)
    if everything or uri is not None:
        if uri is not None and not _under(store, uri):
            raise StoreError(f"nothing under {uri} is in the store {store.path}")
        removed = store.remove(uri or "")
    else:
        removed = store.evict(needed)
    freed = sum(info.allocated_bytes for info in removed)
    report = ChangeReport(store.path, tuple(info.blob.uri for info in removed), freed)
    limits = uri is None and not everything and not removed
    within = ": the store is within its limits" if limits else ""
    cli.emit(report, f"removed {len(removed)} files, {_size(freed)}{within}")


def open_store(cli: Cli) -> "Store":
    """Open the store that the settings name."""
    from weightstream.cachefs.store import Store

    return Store.open(cli.settings)


def _stored(cli: Cli) -> "list[BlobInfo]":
    """Return what the store holds; nothing when it cannot be used."""
    try:
        return list(open_store(cli).blobs())
    except StoreError as error:
        cli.note(f"the store is left out: {error}")
        return []


def _under(store: "Store", uri: str) -> "list[BlobInfo]":
    from weightstream.cachefs.store.info import is_under

    return [info for info in store.blobs() if is_under(info.blob.uri, uri)]


def _files_under(store: "Store", infos: "list[BlobInfo]", uri: str) -> tuple[FileRow, ...]:
    """Return the files that the model was last known to have, else those that are stored."""
    from weightstream.cachefs.store.info import is_under

    listing = store.load_listing(uri.rstrip("/"))
    known = listing.blobs if listing else ()
    stored = [info.blob for info in infos if is_under(info.blob.uri, uri)]
    rows = _file_rows([*known, *(blob for blob in stored if blob not in known)], infos)
    if not rows:
        raise NotFoundError(f"nothing is known of {uri} in the store {store.path}")
    return rows


def _file_rows(blobs: "Iterable[Blob]", infos: "list[BlobInfo]") -> tuple[FileRow, ...]:
    by_blob = {info.blob: info for info in infos}
    rows = []
    for blob in blobs:
        info = by_blob.get(blob)
        rows.append(
            FileRow(
                uri=blob.uri,
                size_bytes=blob.size,
                version=blob.version,
                stored_bytes=info.present_bytes if info else 0,
                complete=info.complete if info else False,
                pinned=info.pinned if info else False,
                in_use=info.in_use if info else False,
                last_used_s=info.last_used_s if info else None,
            )
        )
    return tuple(rows)


def _model_rows(infos: "list[BlobInfo]") -> tuple[ModelRow, ...]:
    folders: dict[str, list[BlobInfo]] = {}
    for info in infos:
        folders.setdefault(_folder(info.blob.uri), []).append(info)
    return tuple(_model_row(uri, folders[uri]) for uri in sorted(folders))


def _model_row(uri: str, infos: "list[BlobInfo]") -> ModelRow:
    return ModelRow(
        uri=uri,
        files=len(infos),
        size_bytes=sum(info.blob.size for info in infos),
        stored_bytes=_present(infos),
        complete=all(info.complete for info in infos),
        pinned=all(info.pinned for info in infos),
        in_use=any(info.in_use for info in infos),
        last_used_s=max(info.last_used_s for info in infos),
    )


def _folder(uri: str) -> str:
    return uri.rsplit("/", 1)[0]


def _present(infos: "Iterable[BlobInfo]") -> int:
    return sum(info.present_bytes for info in infos)


def _models_table(rows: Iterable[ModelRow]) -> "RenderableType":
    cells = (
        (row.uri, str(row.files), _size(row.size_bytes), *_state(row), _ago(row.last_used_s))
        for row in rows
    )
    headers = ("MODEL", "FILES", "SIZE", "STORED", "", "USED")
    return table(headers, cells, right="FILES SIZE STORED")


def _files_table(rows: Iterable[FileRow]) -> "RenderableType":
    cells = ((row.uri, _size(row.size_bytes), *_state(row)) for row in rows)
    return table(("FILE", "SIZE", "STORED", ""), cells, right="SIZE STORED")


def _state(row: FileRow | ModelRow) -> tuple[str, str]:
    """Return percent and marks; 100 % is said only of what is complete and sealed."""
    if row.complete:
        percent = "100 %"
    else:
        percent = f"{min(99, 100 * row.stored_bytes // max(1, row.size_bytes))} %"
    marks = (("pinned", row.pinned), ("in use", row.in_use))
    return percent, ", ".join(name for name, holds in marks if holds)


def _size(count: int) -> str:
    from weightstream.settings import format_bytes

    return format_bytes(count)


def _ago(moment_s: float) -> str:
    """Return how long ago, in the largest unit: `3 h ago`."""
    age = max(0, int(time.time() - moment_s))
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if age >= unit:
            return f"{age // unit} {name} ago"
    return f"{age} s ago"
