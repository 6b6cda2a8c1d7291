"""`weightstream doctor`: what this machine can do, what limits it, the command that lifts it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from weightstream.cli.doctor.check import Check


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """Every row, and whether all is well enough to work."""

    healthy: bool
    checks: "tuple[Check, ...]"


def doctor(
    cli: Cli,
    uri: Annotated[
        str | None,
        typer.Argument(help="Look at the way to this model's origin, too.", metavar="[URI]"),
    ] = None,
) -> int:
    """Show what this machine can do, what limits it and the command that lifts it."""
    from weightstream.cli.doctor import disk, machine, mounts, network, software

    settings = cli.settings
    rows = [*machine.checks(settings), *disk.checks(settings), *mounts.checks(settings)]
    rows += software.checks()
    if uri is not None:
        rows += network.checks(uri, settings)
    report = DoctorReport(all(row.status != "fail" for row in rows), tuple(rows))
    cli.emit(report, _table(report), *_remedies(report))
    return 0 if report.healthy else 1


_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def _table(report: DoctorReport) -> "RenderableType":
    from rich.text import Text

    rows = ((Text(c.status, _STYLES[c.status]), c.group, c.name, c.found) for c in report.checks)
    return table(("", "", "WHAT", "FOUND"), rows)


def _remedies(report: DoctorReport) -> list[str]:
    bad = [row for row in report.checks if row.status != "ok"]
    if not bad:
        return ["\nNothing limits weightstream here."]
    return [f"\n{row.name}: {row.limits}\n  -> {row.remedy}" for row in bad]
