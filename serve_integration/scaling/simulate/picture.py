"""A trace and its runs as a picture: replicas, queue, and the latencies of the accepted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from weightstream.serve_integration.scaling.simulate.table import outcome
from weightstream.serve_integration.scaling.simulate.world import Run

_COLOURS = ("#0b6e4f", "#c8553d", "#6c7a89", "#e0a526")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def draw(runs: Sequence[Run], ideal: Sequence[tuple[float, float]], title: str, path: Path) -> None:
    """Write a picture in the format that the path's ending names."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 8.5), layout="constrained")
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        replicas, queue, latency = figure.subplots(3, 1, height_ratios=(3, 2, 2))
        queue.sharex(replicas)
        _replicas(replicas, runs, ideal)
        _queue(queue, runs)
        _latency(latency, runs)
        figure.savefig(path, dpi=140)


def _replicas(axes: Any, runs: Sequence[Run], ideal: Sequence[tuple[float, float]]) -> None:
    axes.set_title("Replicas: ordered (line), ready (dotted); grey: what the requests need")
    axes.fill_between(*zip(*ideal, strict=True), step="post", color="#dfe4e8", linewidth=0)
    for run, colour in zip(runs, _COLOURS, strict=False):
        times = [point.at_s for point in run.points]
        row = outcome(run)
        label = f"{run.name}: {row.replica_seconds:,.0f} replica-seconds"
        ordered, ready = zip(*((p.ordered, p.ready) for p in run.points), strict=True)
        axes.step(times, ordered, where="post", color=colour, linewidth=1.4, label=label)
        axes.step(times, ready, where="post", color=colour, linewidth=1, linestyle=":")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _queue(axes: Any, runs: Sequence[Run]) -> None:
    axes.set_title("Requests that wait")
    for run, colour in zip(runs, _COLOURS, strict=False):
        label = f"{run.name}: {run.rejected:,} refused"
        times, queued = zip(*((point.at_s, point.queued) for point in run.points), strict=True)
        axes.step(times, queued, where="post", color=colour, linewidth=1.2, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, fontsize=8)


def _latency(axes: Any, runs: Sequence[Run]) -> None:
    axes.set_title("Latency of the accepted: share that took longer")
    for run, colour in zip(runs, _COLOURS, strict=False):
        count = len(run.latencies_s)
        if not count:
            continue
        kept = range(0, count, max(1, count // 2000))
        label = f"{run.name}: p99 {outcome(run).p99_s:.3g} s"
        shares = [1 - index / count for index in kept]
        axes.plot([run.latencies_s[i] for i in kept], shares, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_ylim(1e-3, 1)
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, fontsize=8)
