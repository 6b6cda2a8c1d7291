"""Turns samples into rows: medians with their spread, per cell and variant. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from weightstream.bench.jobs import Outcome, Sample


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of some values."""

    middle: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Row:
    """One variant in one cell."""

    cell: str
    label: str
    count: int
    failed: int
    error: str  # of the last failure
    wall_s: Spread
    gb_s: Spread
    cpu_s_per_gb: Spread
    first_tensor_s: Spread
    touch_s: Spread
    rss_bytes: Spread
    import_s: Spread
    wire_ratio: float  # sent by the server / bytes of the tensors; 0 for local files


_NOTHING = Spread(0.0, 0.0, 0.0)


def spread(values: Sequence[float]) -> Spread:
    """Return median, least and greatest; zeros for no values."""
    return Spread(median(values), min(values), max(values)) if values else _NOTHING


def rows(samples: Sequence[Sample]) -> tuple[Row, ...]:
    """Return one row per cell and label, in the order of their first sample."""
    keys = list(dict.fromkeys((sample.cell, sample.label) for sample in samples))
    return tuple(
        _row(cell, label, [s for s in samples if (s.cell, s.label) == (cell, label)])
        for cell, label in keys
    )


def _row(cell: str, label: str, samples: Sequence[Sample]) -> Row:
    good = [s.outcome for s in samples if s.outcome is not None]
    errors = [s.error for s in samples if s.outcome is None]
    rounds = len({s.round for s in samples if s.outcome is not None})
    wire = sum(s.wire_bytes for s in samples if s.outcome is not None)
    size = good[0].size_bytes if good else 0
    return Row(
        cell=cell,
        label=label,
        count=len(good),
        failed=len(errors),
        error=errors[-1] if errors else "",
        wall_s=spread([o.wall_s for o in good]),
        gb_s=spread([_gb(o) / o.wall_s for o in good if o.wall_s]),
        cpu_s_per_gb=spread([o.cpu_s / _gb(o) for o in good if o.size_bytes]),
        first_tensor_s=spread([o.first_tensor_s for o in good]),
        touch_s=spread([o.checksum_s for o in good]),
        rss_bytes=spread([float(o.rss_peak_bytes) for o in good]),
        import_s=spread([o.import_s for o in good]),
        wire_ratio=wire / (size * rounds) if size and rounds else 0.0,
    )


def _gb(outcome: Outcome) -> float:
    return outcome.size_bytes / 1e9
