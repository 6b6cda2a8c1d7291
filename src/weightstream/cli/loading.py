"""`weightstream load`: load a model as a program would, and say what it took."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table
from weightstream.cli.models import Uri
from weightstream.cli.progress import Meter

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.loader import LoadReport

_GROUP = "What to load"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The phases of a load, and the rates that follow from them."""

    report: "LoadReport"
    device: str
    rate_bytes_s: float
    """Bytes per second of the whole call."""
    transfer_bytes_s: float | None
    """Bytes per second between the first and the last byte that were read."""


def load(
    cli: Cli,
    uri: Uri,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=_GROUP)
    ] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="Cast floating tensors, e.g. to bfloat16.", rich_help_panel=_GROUP),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Only this tensor; repeatable.", rich_help_panel=_GROUP),
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Ask the origin, never fall back to what is stored."),
    ] = False,
) -> None:
    """Load a model into memory, time it and show the phases."""
    settings = cli.settings_with({"fresh": True} if fresh else {})
    from weightstream.loader import load_with_report

    with Meter(cli, uri.rstrip("/").rsplit("/", 1)[-1]) as meter:
        loaded = load_with_report(uri, device, dtype, name, meter.update, settings=settings)
    result = _result(loaded.report, device)
    cli.emit(result, _summary(result), _phases(loaded.report))
    _finish(cli)


def _result(report: "LoadReport", device: str) -> LoadResult:
    first, last = report.first_byte_s, report.last_byte_s
    read = sum(n for source, n in report.bytes_by_source.items() if source != "mapped")
    transfer = read / (last - first) if first is not None and last and last > first else None
    return LoadResult(report, device, report.bytes_total / max(report.ready_s, 1e-9), transfer)


def _summary(result: LoadResult) -> str:
    from weightstream.settings import format_bytes

    report = result.report
    size, rate = format_bytes(report.bytes_total), format_bytes(int(result.rate_bytes_s))
    sources = ", ".join(f"{name} {format_bytes(n)}" for name, n in report.bytes_by_source.items())
    return (
        f"{report.tensors} tensors, {size} on {result.device} "
        f"in {_seconds(report.ready_s)}, {rate}/s\n"
        f"from {sources or 'nothing'}; {report.retries} retries, {report.hedges} hedges\n"
    )


def _phases(report: "LoadReport") -> "RenderableType":
    phases = (
        ("files and versions known", report.resolve_s),
        ("headers read, plan made", report.header_s),
        ("first byte", report.first_byte_s),
        ("last byte", report.last_byte_s),
        ("write-back let go of the memory", report.settle_s),
        ("tensors ready", report.ready_s),
    )
    rows = ((name, _seconds(at)) for name, at in phases if at is not None)
    return table(("PHASE", "AT"), rows, right="AT")


def _seconds(duration_s: float) -> str:
    return f"{duration_s * 1e3:.0f} ms" if duration_s < 1 else f"{duration_s:.2f} s"


def _finish(cli: Cli) -> None:
    """Say what the process still waits for; the wait itself is the engine's, at exit."""
    from weightstream.cachefs.fetch import process_engine

    if not process_engine(cli.settings).write_back.drain(0):
        cli.note(f"finishing the copy in {cli.settings.store}")
