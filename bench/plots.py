"""Pictures of a run: time, CPU and memory per peer; rate over links; warm loads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from weightstream.bench.links import parse_link
from weightstream.bench.report import Report
from weightstream.bench.summary import Row, Spread, rows

_OURS, _THEIRS, _RAW = "#0b6e4f", "#9aa5b1", "#e0a526"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
}


def write_plots(report: Report, folder: Path) -> tuple[Path, ...]:
    """Draw what the run has samples for; return the files."""
    summary = [row for row in rows(report.samples) if row.count]
    drawn: list[Path] = []
    with mpl.rc_context(_STYLE):
        for protocol in ("http", "https"):
            if part := [row for row in summary if row.cell == f"cold/loopback/{protocol}"]:
                drawn.append(_save(_cold(report, part), folder / f"cold-{protocol}.png"))
        if part := [row for row in summary if row.cell.startswith("warm/")]:
            drawn.append(_save(_warm(report, part), folder / "warm.png"))
        if part := [row for row in summary if "gbit/" in row.cell]:
            drawn.append(_save(_links(report, part), folder / "links.png"))
    return tuple(drawn)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=140)
    return path


def _color(label: str) -> str:
    if label.startswith("weightstream"):
        return _OURS
    return _RAW if label.startswith("curl") else _THEIRS


def _bars(
    axes: Any, labels: Sequence[str], values: Sequence[Spread], title: str, form: str
) -> None:
    """Draw horizontal bars of medians, with a thin line from least to most."""
    places = range(len(labels))
    axes.barh(places, [v.middle for v in values], color=[_color(label) for label in labels])
    for place, value in zip(places, values, strict=True):
        axes.plot((value.least, value.most), (place, place), color="black", linewidth=1)
        axes.text(value.most, place, "  " + form.format(value.middle), va="center", fontsize=8)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_title(title, loc="left")


def _panels(report: Report, part: Sequence[Row], title: str, panels: Sequence[Any]) -> Figure:
    figure = Figure(figsize=(4.2 + 3.1 * len(panels), 1.2 + 0.3 * len(part)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (heading, value, form) in zip(all_axes, panels, strict=True):
        _bars(axes, [row.label for row in part], [value(row) for row in part], heading, form)
    size = f"{report.model_bytes / (1 << 30):.2f} GiB"
    machine = f"{report.machine.cores} cores, {report.date[:10]}"
    figure.suptitle(f"{title} - {size}, {machine}", x=0.01, ha="left", fontsize=11)
    return figure


def _cold(report: Report, part: Sequence[Row]) -> Figure:
    ordered = sorted(part, key=lambda row: row.wall_s.middle)
    return _panels(
        report,
        ordered,
        report.title_of(part[0].cell),
        (
            ("GB/s", lambda row: row.gb_s, "{:.2f}"),
            ("CPU s per GB", lambda row: row.cpu_s_per_gb, "{:.2f}"),
            ("peak memory, GiB", lambda row: _scaled(row.rss_bytes, 1 << 30), "{:.1f}"),
        ),
    )


def _scaled(values: Spread, by: float) -> Spread:
    return Spread(values.middle / by, values.least / by, values.most / by)


def _warm(report: Report, part: Sequence[Row]) -> Figure:
    cells = list(dict.fromkeys(row.cell for row in part))
    figure = Figure(figsize=(4.2 + 3.6 * len(cells), 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    labels = list(dict.fromkeys(row.label for row in part))
    for axes, cell in zip(all_axes, cells, strict=True):
        found = {row.label: row for row in part if row.cell == cell}
        for place, label in enumerate(labels):
            if label in found:
                _stacked(axes, place, found[label])
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title(report.title_of(cell) + ": s", loc="left")
        axes.margins(x=0.2)
    all_axes[0].invert_yaxis()
    figure.suptitle("load (dark), then every byte read (light)", x=0.01, ha="left", fontsize=10)
    return figure


def _stacked(axes: Any, place: int, row: Row) -> None:
    load, touch = row.wall_s.middle, row.touch_s.middle
    color = _color(row.label)
    axes.barh(place, load, color=color)
    axes.barh(place, touch, left=load, color=color, alpha=0.4)
    axes.text(load + touch, place, f"  {load:.3f} + {touch:.2f}", va="center", fontsize=8)


def _links(report: Report, part: Sequence[Row]) -> Figure:
    """Draw the part of the link's theoretical payload rate that each peer reached."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    for label in dict.fromkeys(row.label for row in part):
        points = sorted(_point(row) for row in part if row.label == label)
        style = "-" if label.startswith("weightstream") else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label, alpha=0.9)
    axes.axhline(95, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    ticks = sorted({_point(row)[0] for row in part})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("link, Gbit/s")
    axes.set_ylabel("% of the link's payload rate, call to last tensor")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("cold load over shaped links", loc="left")
    return figure


def _point(row: Row) -> tuple[float, float]:
    """Return the link's rate in Gbit/s and the percentage of its payload rate."""
    link = parse_link(row.cell.split("/")[1])
    return link.gbit or 0.0, 100 * row.gb_s.middle * 1e9 / link.payload_bytes_s
