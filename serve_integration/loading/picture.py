"""The timeline as a picture: per load what the program did, and below it what its weights did."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightstream.serve_integration.loading.noting import ReplicaLoads
from weightstream.serve_integration.loading.phases import Phases

_COLORS = {
    "process": "#d7dce1",
    "imports": "#b3bcc6",
    "build, and wait": "#eef1f3",
    "find, headers": "#f2c14e",
    "bytes": "#0b6e4f",
    "map": "#2fa37c",
    "to device": "#8d6a9f",
    "assign": "#3d6fa5",
}
_HEIGHT = 0.34
_MOST_LOADS = 40
"""The latest; more cannot be read."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of one load."""

    name: str
    start_s: float
    end_s: float


def program(phases: Phases) -> tuple[Segment, ...]:
    """Return what the process did."""
    return _filled(
        Segment("process", 0.0, phases.process_s),
        Segment("imports", phases.process_s, phases.import_s),
        Segment("build, and wait", phases.import_s, _here_s(phases)),
        Segment("to device", _here_s(phases), phases.to_device_s),
        Segment("assign", phases.to_device_s, phases.ready_s),
    )


def weights(phases: Phases) -> tuple[Segment, ...]:
    """Return what the weights did meanwhile."""
    if phases.first_byte_s is None or phases.last_byte_s is None:
        return _filled(
            Segment("find, headers", phases.process_s, phases.header_s),
            Segment("map", phases.header_s, phases.to_device_s),
        )
    return _filled(
        Segment("find, headers", phases.process_s, phases.first_byte_s),
        Segment("bytes", phases.first_byte_s, phases.last_byte_s),
    )


def draw(replicas: Sequence[ReplicaLoads], path: Path) -> None:
    """Write the picture of the latest loads; needs matplotlib. The suffix says which format."""
    from matplotlib.figure import Figure

    loads = [(replica, phases) for replica in replicas for phases in replica.loads][-_MOST_LOADS:]
    figure = Figure(figsize=(11, 1.8 + 0.75 * len(loads)), layout="constrained")
    axes: Any = figure.subplots()
    for place, (_, phases) in enumerate(loads):
        _draw_load(axes, place, phases)
    axes.set_yticks(range(len(loads)), [_title(*load) for load in loads])
    axes.set_ylim(max(1, len(loads)) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.1)
    axes.set_xlabel("seconds since the replica's process began, or a later load was asked for")
    axes.set_title("Loads: the program, and below it its weights", loc="left", fontweight="bold")
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _legend(figure, [phases for _, phases in loads])
    figure.savefig(path, dpi=150)


def _here_s(phases: Phases) -> float:
    """Return when module and weights were both there."""
    last_s = phases.header_s if phases.last_byte_s is None else phases.last_byte_s
    return min(max(phases.import_s, last_s), phases.to_device_s)


def _filled(*segments: Segment) -> tuple[Segment, ...]:
    return tuple(segment for segment in segments if segment.end_s > segment.start_s)


def _draw_load(axes: Any, place: int, phases: Phases) -> None:
    for shift, segments in ((-_HEIGHT / 2, program(phases)), (_HEIGHT / 2, weights(phases))):
        for one in segments:
            width = one.end_s - one.start_s
            axes.barh(place + shift, width, _HEIGHT, one.start_s, color=_COLORS[one.name])
    text = f" {phases.ready_s:.2f} s, {phases.warmth}"
    axes.text(phases.ready_s, place, text, va="center", fontsize=8)


def _title(replica: ReplicaLoads, phases: Phases) -> str:
    model = phases.uri.rsplit("/", 1)[-1]
    return f"{replica.app}#{replica.deployment} {replica.replica}\n{model}"


def _legend(figure: Any, loads: Sequence[Phases]) -> None:
    from matplotlib.patches import Patch

    def used() -> Iterator[str]:
        for phases in loads:
            yield from (segment.name for segment in (*program(phases), *weights(phases)))

    names = set(used())
    patches = [Patch(color=color, label=name) for name, color in _COLORS.items() if name in names]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
