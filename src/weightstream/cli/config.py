"""`weightstream config`: every setting, its value, and who gave it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weightstream.cli.base import Cli, table
from weightstream.errors import UsageError

if TYPE_CHECKING:
    from weightstream.settings import Effective


@dataclass(frozen=True, slots=True)
class ConfigReport:
    """The effective settings and where a file would be read from."""

    file: Path
    file_exists: bool
    memory_budget_bytes: int
    settings: "tuple[Effective, ...]"


def _names(incomplete: str) -> list[str]:
    from weightstream.settings import table as settings_table

    return [row.name for row in settings_table() if row.name.startswith(incomplete)]


def config(
    cli: Cli,
    name: Annotated[
        str | None,
        typer.Argument(help="Print the value of this setting only.", autocompletion=_names),
    ] = None,
) -> None:
    """Show every setting, its value and where that came from."""
    from weightstream.settings import did_you_mean, effective

    rows = {row.name: row for row in effective(cli.overrides(), given_by="flag")}
    if name is not None:
        key = name.replace("-", "_")
        if key not in rows:
            raise UsageError(f"unknown setting {name!r}{did_you_mean(key, rows)}")
        cli.emit(rows[key], str(rows[key].text))
        return
    report = _report(cli, tuple(rows.values()))
    shown = ((row.name, _shown(row, report), row.source) for row in report.settings)
    missing = "" if report.file_exists else " (does not exist)"
    cli.emit(report, table(("SETTING", "VALUE", "FROM"), shown), f"\nfile: {report.file}{missing}")


def _report(cli: Cli, rows: "tuple[Effective, ...]") -> ConfigReport:
    from weightstream.cachefs.fetch.budget import budget_bytes
    from weightstream.settings import config_path

    path = config_path()
    budget = budget_bytes(cli.settings.memory_budget)
    return ConfigReport(path, path.exists(), budget, rows)


def _shown(row: "Effective", report: ConfigReport) -> str:
    from weightstream.settings import format_bytes

    if row.name == "memory_budget" and row.value == 0:
        return f"{row.text} = {format_bytes(report.memory_budget_bytes)} here"
    return row.text
