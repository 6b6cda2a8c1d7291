"""Progress on stderr: bytes, rate, time left and where the bytes come from.

On a terminal a bar, redrawn ten times a second at most; elsewhere a line now and then, so that the
log of a job shows that it lives. With --quiet nothing.
"""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from weightstream.cli.base import Cli

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from weightstream.cachefs.fetch import Progress

_LINE_EVERY_S = 10.0
_UPDATE_EVERY_S = 0.1


class Meter:
    """Shows one job's progress. A context manager; `update` may be called from any thread."""

    def __init__(self, cli: Cli, title: str) -> None:
        self._title = title
        self._quiet = cli.flags.quiet
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._next_s = time.monotonic() + _LINE_EVERY_S

    def update(self, progress: "Progress") -> None:
        """Show how far a flow is."""
        self.advance(progress.bytes_done, progress.bytes_total, source_mix(progress))

    def advance(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total` bytes."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif not self._quiet and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LINE_EVERY_S
            percent = 100 * done // max(total, 1)
            print(f"{self._title}: {percent} % of {total} bytes {note}".rstrip(), file=sys.stderr)

    def __enter__(self) -> "Meter":
        if not self._quiet and sys.stderr.isatty():
            self._bar = bar = _bar()
            self._task = bar.add_task(self._title, total=None, note="")
            bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def source_mix(progress: "Progress") -> str:
    """Return the share of each source, such as `origin 75 %, store 25 %`."""
    shares = progress.bytes_by_source.items()
    total = sum(count for _, count in shares)
    parts = (f"{name} {round(100 * count / total)} %" for name, count in shares if count)
    return ", ".join(parts)


def _bar() -> "RichProgress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=1 / _UPDATE_EVERY_S,
    )
