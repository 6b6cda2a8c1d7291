"""What a run leaves behind: tables on the terminal and in Markdown, and everything in JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from weightstream.bench.claims import Claim
from weightstream.bench.jobs import Sample
from weightstream.bench.machine import Machine
from weightstream.bench.summary import Row, Spread, rows

FORMAT = 1
_MARKS = {True: "pass", False: "FAIL", None: "not measured"}
_COLORS = {True: "green", False: "bold red", None: "yellow"}


@dataclass(frozen=True, slots=True)
class Report:
    """One run."""

    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    server: str
    model: str
    model_bytes: int
    repeats: int
    notes: tuple[str, ...]
    titles: tuple[tuple[str, str], ...]  # of cells, by name
    samples: tuple[Sample, ...]
    claims: tuple[Claim, ...]

    def title_of(self, cell: str) -> str:
        """Return the title of a cell by its name."""
        return dict(self.titles).get(cell, cell)


def write_json(report: Report, path: Path) -> None:
    """Write every sample and everything that is needed to judge it."""
    values = {
        "format": FORMAT,
        "command": report.command,
        "date": report.date,
        "machine": asdict(report.machine),
        "versions": report.versions,
        "server": report.server,
        "model": report.model,
        "model_bytes": report.model_bytes,
        "repeats": report.repeats,
        "notes": report.notes,
        "claims": [{**asdict(claim), "passed": claim.passed} for claim in report.claims],
        "rows": [asdict(row) for row in rows(report.samples)],
        "samples": [sample.to_dict() for sample in report.samples],
    }
    path.write_text(json.dumps(values, indent=1) + "\n")


def print_report(report: Report, console: Console) -> None:
    """Print one table per cell and the table of claims."""
    summary = rows(report.samples)
    for cell in dict.fromkeys(row.cell for row in summary):
        part = [row for row in summary if row.cell == cell]
        console.print(_cell_table(report.title_of(cell), [row for row in part if row.count]))
        for row in part:
            if row.error:
                console.print(f"  {row.label}: {row.failed} failed: {row.error}", style="red")
    console.print(_claims_table(report.claims))
    for note in report.notes:
        console.print(f"note: {note}", style="dim", highlight=False)


_COLUMNS = (
    "peer", "n", "wall s", "GB/s", "CPU s/GB", "first tensor s", "touch s", "peak MiB", "wire",
)  # fmt: skip


def _cell_table(title: str, part: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "peer" else "right", no_wrap=True)
    for row in sorted(part, key=lambda row: row.wall_s.middle):
        table.add_row(*_row_cells(row), style="bold" if "weightstream" in row.label else "")
    return table


def _row_cells(row: Row) -> tuple[str, ...]:
    if row.count == 0:
        return row.label, "0", f"failed: {row.error[:60]}", *[""] * (len(_COLUMNS) - 3)
    count = f"{row.count}" + (f" (+{row.failed} failed)" if row.failed else "")
    return (
        row.label,
        count,
        _text(row.wall_s, 2 if row.wall_s.middle > 1 else 3),
        f"{row.gb_s.middle:.2f}",
        f"{row.cpu_s_per_gb.middle:.2f}",
        f"{row.first_tensor_s.middle:.3f}",
        f"{row.touch_s.middle:.3f}",
        f"{row.rss_bytes.most / (1 << 20):.0f}",
        f"{row.wire_ratio:.3f}" if row.wire_ratio else "-",
    )


def _text(values: Spread, digits: int) -> str:
    middle, least, most = (f"{v:.{digits}f}" for v in (values.middle, values.least, values.most))
    return middle if least == most else f"{middle} ({least}-{most})"


def _claims_table(claims: Sequence[Claim]) -> Table:
    table = Table(title="Targets", title_justify="left", title_style="bold")
    for name in ("what", "target", "measured", "", "from"):
        table.add_column(name, justify="right" if name == "measured" else "left")
    for claim in claims:
        mark = f"[{_COLORS[claim.passed]}]{_MARKS[claim.passed]}[/]"
        table.add_row(claim.name, claim.target, measured_text(claim), mark, claim.basis)
    return table


def measured_text(claim: Claim) -> str:
    """Return the measured value with its unit."""
    if claim.measured is None:
        return "-"
    digits = 2 if claim.unit in ("x", "ms") else 0
    return f"{claim.measured:.{digits}f} {claim.unit}".replace(" x", "x")


def markdown(report: Report) -> str:
    """Return the tables as Markdown, for the README and for pull requests."""
    lines = [
        f"`{report.command}`, {report.date}: {report.machine.line()}; server {report.server}; "
        f"model {report.model}, {report.model_bytes / (1 << 30):.2f} GiB; "
        f"median of {report.repeats} (least-most), every sample a fresh process.",
        "",
        *_markdown_table(
            ("what", "target", "measured", ""),
            [(c.name, c.target, measured_text(c), _MARKS[c.passed]) for c in report.claims],
        ),
    ]
    summary = rows(report.samples)
    for cell in dict.fromkeys(row.cell for row in summary):
        part = sorted((r for r in summary if r.cell == cell), key=lambda r: r.wall_s.middle)
        lines += ["", f"**{report.title_of(cell)}**", ""]
        lines += _markdown_table(_COLUMNS, [_row_cells(row) for row in part])
    lines += ["", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines) + "\n"


def _markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cells)} |" for cells in body),
    ]
