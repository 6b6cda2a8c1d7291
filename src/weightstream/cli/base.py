"""What every command shares: the common flags, the settings made from them, and the output.

A command is a function whose first parameter is a `Cli`. `command` registers it with typer and adds
the common flags to its own, so that `weightstream status --json` and every other command take them
in the same words.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from weightstream.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from weightstream.settings import Settings

COMMON = "Common options"


@dataclass(frozen=True, slots=True)
class Flags:
    """The common flags, as given."""

    store: Path | None = None
    set: tuple[str, ...] = ()
    json: bool = False
    quiet: bool = False
    verbose: int = 0


class Cli:
    """One run of a command."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags

    def overrides(self) -> dict[str, object]:
        """Return the settings that were given as flags."""
        given: dict[str, object] = {}
        for pair in self.flags.set:
            name, separator, value = pair.partition("=")
            if not separator:
                raise UsageError(f"--set {pair!r} is not of the form KEY=VALUE")
            given[name.strip().replace("-", "_")] = value.strip()
        if self.flags.store is not None:
            given["store"] = self.flags.store
        if self.flags.verbose or self.flags.quiet:
            levels = ("ERROR" if self.flags.quiet else "WARNING", "INFO", "DEBUG")
            given["log_level"] = levels[min(self.flags.verbose, 2)]
        return given

    @cached_property
    def settings(self) -> "Settings":
        """Return the effective settings; set the log level by them."""
        return self.settings_with({})

    def settings_with(self, more: dict[str, object]) -> "Settings":
        """Return the effective settings with some that a command's own flags gave."""
        from weightstream.log import configure
        from weightstream.settings import load_settings

        settings = load_settings(self.overrides() | more, given_by="flag")
        configure(settings.log_level)
        return settings

    @cached_property
    def stdout(self) -> "Console":
        """Return where results go; wide when nobody looks, so that a pipe gets whole lines."""
        from rich.console import Console

        terminal = sys.stdout.isatty()
        return Console(width=None if terminal else 240, highlight=False, markup=False)

    def emit(self, report: object, *parts: "RenderableType") -> None:
        """Print a result: one JSON document with --json, else the parts for a person."""
        if self.flags.json:
            print(json.dumps(plain(report), indent=2))
            return
        for part in parts:
            self.stdout.print(part)

    def note(self, text: str) -> None:
        """Tell a person what goes on; on stderr, not with --quiet."""
        if not self.flags.quiet:
            print(text, file=sys.stderr)


def plain(value: object) -> Any:
    """Return what json.dumps takes: dataclasses as objects, paths and enums as strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name.lower()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def table(
    headers: Iterable[str], rows: "Iterable[Iterable[str | Text]]", right: str = ""
) -> "RenderableType":
    """Return an aligned table without lines; `right` names the right-aligned columns."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        grid.add_column(
            header,
            justify="right" if header in right.split() else "left",
            no_wrap=header in right.split(),
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return grid


def _set_names(incomplete: str) -> list[str]:
    from weightstream.settings import table as settings_table

    return [f"{row.name}=" for row in settings_table() if row.name.startswith(incomplete)]


def _common(
    *,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store", help="The store's directory.", rich_help_panel=COMMON, show_default=False
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-o",
            metavar="KEY=VALUE",
            help="Any setting, such as -o write_back=off; `weightstream config` lists them.",
            rich_help_panel=COMMON,
            autocompletion=_set_names,
        ),
    ] = None,
    json_: Annotated[
        bool,
        typer.Option("--json", help="One JSON document on stdout.", rich_help_panel=COMMON),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="No progress, errors only.", rich_help_panel=COMMON),
    ] = False,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            help="Say more on stderr; twice for debugging.",
            rich_help_panel=COMMON,
            show_default=False,
        ),
    ] = 0,
) -> Flags:
    return Flags(store, tuple(set_ or ()), json_, quiet, verbose)


def command(app: typer.Typer, group: str) -> Callable[[Callable[..., int | None]], None]:
    """Register a function as a command of `app`, in a help group, with the common flags."""

    def register(function: Callable[..., int | None]) -> None:
        own = [p for p in _parameters(function) if p.name != "cli"]
        common = _parameters(_common)
        names = {parameter.name for parameter in common}

        def run(**values: Any) -> int | None:
            flags = _common(**{name: values.pop(name) for name in names})
            return function(Cli(flags), **values)

        run.__doc__ = function.__doc__
        run.__name__ = function.__name__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own + common]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        name = function.__name__.rstrip("_").replace("_", "-")
        app.command(name, rich_help_panel=group)(run)

    return register


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return a function's parameters with their annotations resolved."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return [p.replace(annotation=hints[p.name]) for p in parameters]
