"""`weightstream prefetch` and `scrub`: the long jobs on the store."""

from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, plain
from weightstream.cli.models import open_store
from weightstream.cli.progress import Meter

if TYPE_CHECKING:
    from weightstream.cachefs.prefetch import PrefetchReport
    from weightstream.cachefs.store import BlobInfo, ScrubReport, Store
    from weightstream.settings import Settings

Uris = Annotated[list[str], typer.Argument(metavar="URI...", help="Models or files.")]


def prefetch(cli: Cli, uri: Uris) -> None:
    """Bring models into the store, all their files; the next load maps them."""
    store = open_store(cli)
    rows, lines = [], []
    for one in uri:
        with Meter(cli, one.rsplit("/", 1)[-1]) as meter:
            report, reused = _bring(one, cli.settings, store, meter)
        rows.append({**plain(report), "bytes_reused": reused})
        lines.append(_line(report, reused))
    cli.emit(rows, *lines)


def _bring(
    uri: str, settings: "Settings", store: "Store", meter: Meter
) -> "tuple[PrefetchReport, int]":
    """Take what the store has of a published model in other files, and fetch the rest.

    The node's agent does it where one runs.
    """
    from weightstream.cachefs.agent.asking import prefetch as bring
    from weightstream.p2p.manifest.reuse import Reused, confirm, reuse_model

    keeps = settings.write_back == "on"
    reused = reuse_model(uri, settings, store) if keeps else Reused(uri)
    report = bring(uri, settings, store, meter.update)
    if confirm(reused, settings, store):
        return report, reused.bytes
    return bring(uri, settings, store, meter.update), 0


def _line(report: "PrefetchReport", reused: int) -> str:
    from weightstream.settings import format_bytes

    size, fetched = format_bytes(report.bytes_total), format_bytes(report.bytes_fetched)
    rate = format_bytes(int(report.bytes_fetched / max(report.elapsed_s, 1e-9)))
    text = f"{report.uri}: {report.files} files, {size}; fetched {fetched}"
    if report.bytes_fetched:
        text += f" in {report.elapsed_s:.1f} s, {rate}/s"
    if reused:
        text += f"; {format_bytes(reused)} were in the store, in other files"
    if report.unversioned:
        text += f"; {len(report.unversioned)} not kept: the origin names no version of them"
    return text


def scrub(cli: Cli) -> int:
    """Verify everything in the store by its hashes; drop what is wrong."""
    store = open_store(cli)
    with Meter(cli, "scrub") as meter:
        total = sum(info.present_bytes for info in store.blobs())
        done: dict[str, int] = {}

        def advance(info: "BlobInfo", count: int) -> None:
            done[info.blob.id] = count
            meter.advance(sum(done.values()), total, info.blob.name)

        report = store.scrub(advance)
    cli.emit(report, *_scrub_lines(report))
    return 1 if report.dropped_chunks or report.removed_files else 0


def _scrub_lines(report: "ScrubReport") -> list[str]:
    from weightstream.settings import format_bytes

    checked = f"checked {format_bytes(report.checked_bytes)} in {report.blobs} files"
    if not report.dropped_chunks and not report.removed_files:
        return [f"{checked}: all good"]
    found = f"dropped {report.dropped_chunks} chunks, removed {report.removed_files} files"
    return [f"{checked}: {found}", *(f"  damaged: {uri}" for uri in report.damaged_blobs)]
