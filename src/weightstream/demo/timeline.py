"""The demo's picture: what each process did, second by second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from weightstream.demo.show import Lane
from weightstream.demo.steps import (
    DOWNLOAD,
    EXIT,
    FINISH,
    FORWARD,
    HEADERS,
    IMPORTS,
    LIST,
    MAP,
    MODEL,
    OPEN,
    READ,
    STREAM,
)

_COLORS = {
    IMPORTS: "#d7dce1",
    LIST: "#f2c14e",
    HEADERS: "#e08e45",
    STREAM: "#0b6e4f",
    MAP: "#2fa37c",
    FINISH: "#a4d8c2",
    DOWNLOAD: "#8d6a9f",
    OPEN: "#b79ac8",
    READ: "#8fb8de",
    MODEL: "#3d6fa5",
    FORWARD: "#c8553d",
    EXIT: "#e6efe9",
}
_HEIGHT = 0.5


def draw(lanes: Sequence[Lane], path: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(11, 1.6 + 0.95 * len(lanes)), layout="constrained")
    axes: Any = figure.subplots()
    for place, lane in enumerate(lanes):
        _draw_lane(axes, place, lane)
    axes.set_yticks(range(len(lanes)), [lane.title for lane in lanes])
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.02)
    axes.set_xlabel("seconds since the process began")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    size = lanes[0].result.size_bytes / (1 << 30)
    title = f"{size:.2f} GiB checkpoint from S3 on loopback, then MiniLM and a forward pass"
    axes.set_title(title, loc="left", fontweight="bold")
    _legend(figure, lanes)
    figure.savefig(path, dpi=150)


def _draw_lane(axes: Any, place: int, lane: Lane) -> None:
    for phase in lane.result.phases:
        left, color = phase.begin_s - lane.begin_s, _COLORS[phase.name]
        axes.barh(place, phase.length_s, _HEIGHT, left, color=color, linewidth=0)
    work = [phase for phase in lane.result.phases if phase.name != IMPORTS]
    begin = work[0].begin_s - lane.begin_s
    ready = begin + lane.result.ready_s
    top = place - _HEIGHT / 2
    axes.plot(
        (begin, begin, ready, ready), (top - 0.03, top - 0.1, top - 0.1, top - 0.03), "k-", lw=1
    )
    text = f"tensors ready in {_seconds(lane.result.ready_s)}"
    axes.text(begin, top - 0.13, text, ha="left", va="bottom", fontsize=9)


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 0.9995 else f"{value:.2f} s"


def _legend(figure: Figure, lanes: Sequence[Lane]) -> None:
    used = {phase.name for lane in lanes for phase in lane.result.phases}
    merged = {name: color for name, color in _COLORS.items() if name in used}
    patches = [Patch(color=color, label=name) for name, color in merged.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
