"""The targets, row by row, computed from the samples of one run.

A claim names the samples it rests on and compares medians, so that every row of the README's table
can be found again in the JSON of its run. What could not be measured here is said, not left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from weightstream.bench.jobs import Outcome, Sample
from weightstream.bench.links import Link
from weightstream.bench.scenarios import (
    CURL_FILES,
    CURL_NULL,
    NATIVE,
    RUNAI,
    STREAM_BUDGET_BYTES,
    WRITE_BACK_LINK_GBIT,
    WS_CONSUME,
    WS_OFF,
    WS_ON,
    WS_PAIR,
    WS_WARM,
    cold_name,
)

MIB = 1 << 20
PLAIN = "cold/loopback/http"
SECURE = "cold/loopback/https"
PAIR = "pair/loopback/http"
PAYLOAD_LINKS_GBIT = (1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Claim:
    """One row: what is promised, what was measured, and from which samples."""

    name: str
    target: str
    measured: float | None  # None: not measured
    bound: float
    at_least: bool
    unit: str
    basis: str  # the samples, or why there are none

    @property
    def passed(self) -> bool | None:
        """Return whether the target is met; None when it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


@dataclass(frozen=True, slots=True)
class Facts:
    """What claims need beside the samples."""

    model_bytes: int  # of the files


Value = Callable[[Outcome], float]


class Samples:
    """The successful samples of a run, by cell and label."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.all = tuple(samples)

    def of(self, cell: str, label: str) -> tuple[Sample, ...]:
        """Return the successful samples of one variant in one cell."""
        found = (s for s in self.all if s.cell == cell and s.label == label)
        return tuple(s for s in found if s.outcome is not None)

    def labels(self, cell: str, beginning: str) -> tuple[str, ...]:
        """Return the labels in a cell that begin so and have a successful sample."""
        found = (s.label for s in self.all if s.cell == cell and s.outcome is not None)
        return tuple(sorted({label for label in found if label.startswith(beginning)}))

    def median(self, cell: str, label: str, value: Value) -> float | None:
        """Return the median of a value over a variant's samples."""
        values = [value(s.outcome) for s in self.of(cell, label) if s.outcome is not None]
        return median(values) if values else None

    def best(self, cell: str, beginning: str, value: Value) -> tuple[str, float] | None:
        """Return the variant with the smallest median, and that median."""
        found = [
            (label, middle)
            for label in self.labels(cell, beginning)
            if (middle := self.median(cell, label, value)) is not None
        ]
        return min(found, key=lambda pair: pair[1]) if found else None


def wall_s(outcome: Outcome) -> float:
    """Return the time until every byte is in memory."""
    return outcome.wall_s


def cpu_s_per_gb(outcome: Outcome) -> float:
    """Return CPU seconds per 10^9 bytes."""
    return outcome.cpu_s / (outcome.size_bytes / 1e9)


def claims(samples: Sequence[Sample], facts: Facts) -> tuple[Claim, ...]:
    """Return all rows, in the order of the table."""
    found = Samples(samples)
    return (
        _faster(found, PLAIN, WS_OFF, 3.0, "cold, loopback HTTP, write-back off"),
        _less_cpu(found),
        _ceiling(found),
        _faster(found, PLAIN, WS_ON, 2.0, "cold, loopback HTTP, write-back on"),
        _write_back(found),
        *(row for gbit in PAYLOAD_LINKS_GBIT for row in _payload(found, facts, gbit)),
        _faster(found, SECURE, WS_OFF, 2.0, "cold, loopback HTTPS"),
        _warm_wall(found),
        _warm_touch(found, "warm/cached"),
        _warm_touch(found, "warm/evicted"),
        _memory_of_load(found, facts),
        _memory_of_stream(found),
        missing("peak memory, CUDA", "<= budget + 300 MiB", "needs a CUDA device; not a CPU row"),
        _pair(found, facts),
        _same_bytes(found),
    )


def missing(name: str, target: str, reason: str) -> Claim:
    """Return the row for what could not be measured, with the reason."""
    return Claim(name, target, None, 0.0, True, "", reason)


def ratio(
    name: str, target: str, parts: tuple[float | None, float | None], bound: float, basis: str,
    *, at_least: bool = True,
) -> Claim:  # fmt: skip
    """Return the row for the first of two values divided by the second."""
    over, under = parts
    if over is None or not under:
        return missing(name, target, f"no samples: {basis}")
    return Claim(name, target, over / under, bound, at_least, "x", basis)


def _faster(found: Samples, cell: str, label: str, bound: float, name: str) -> Claim:
    target = f">= {bound:g}x the throughput of runai at its best"
    best = found.best(cell, RUNAI, wall_s)
    if best is None:
        return missing(name, target, f"no samples of runai in {cell}")
    ours = found.median(cell, label, wall_s)
    return ratio(name, target, (best[1], ours), bound, f"{cell}: {best[0]} / {label}, wall")


def _less_cpu(found: Samples) -> Claim:
    """Compare with the runai setting of least CPU, not with the fastest: the stricter reading."""
    name, target = "CPU s/GB of the same", "<= 1/3 of runai at its best"
    best = found.best(PLAIN, RUNAI, cpu_s_per_gb)
    if best is None:
        return missing(name, target, f"no samples of runai in {PLAIN}")
    ours = found.median(PLAIN, WS_OFF, cpu_s_per_gb)
    basis = f"{PLAIN}: {WS_OFF} / {best[0]}, CPU s/GB"
    return ratio(name, target, (ours, best[1]), 1 / 3, basis, at_least=False)


def _ceiling(found: Samples) -> Claim:
    name, target = "against the raw ceiling", ">= 0.75 of parallel curl into tmpfs files"
    best = found.best(PLAIN, CURL_FILES, wall_s)
    if best is None:
        return missing(name, target, f"no samples of curl in {PLAIN}")
    ours = found.median(PLAIN, WS_OFF, wall_s)
    return ratio(name, target, (best[1], ours), 0.75, f"{PLAIN}: {best[0]} / {WS_OFF}, wall")


def _write_back(found: Samples) -> Claim:
    link = Link(f"{WRITE_BACK_LINK_GBIT:g}gbit", WRITE_BACK_LINK_GBIT)
    cell = cold_name(link, False)
    parts = found.median(cell, WS_ON, wall_s), found.median(cell, WS_OFF, wall_s)
    return ratio(
        "write-back on / off, 2 Gbit/s", "<= 1.10x the time", parts, 1.10,
        f"{cell}: {WS_ON} / {WS_OFF}, wall", at_least=False,
    )  # fmt: skip


def _payload(found: Samples, facts: Facts, gbit: float) -> tuple[Claim, Claim]:
    """Return two rows: against the payload rate that curl reached, and against arithmetic."""
    link = Link(f"{gbit:g}gbit", gbit)
    cell = cold_name(link, False)
    name = f"payload rate, {gbit:g} Gbit/s, write-back on"
    target = ">= 95 % from first byte to last"
    ours = _rates(found.of(cell, WS_ON), facts)
    raw = max((_rates(found.of(cell, c), facts) for c in found.labels(cell, CURL_NULL)), default=0)
    measured = ratio(
        f"{name}, of curl", target, (ours or None, raw), 0.95, f"{cell}: {WS_ON} / {CURL_NULL}"
    )
    theory = ratio(
        f"{name}, of theory", target, (ours or None, link.payload_bytes_s), 0.95,
        f"{cell}: {WS_ON} / (rate x 1448/1514)",
    )  # fmt: skip
    return measured, theory


def _rates(samples: Sequence[Sample], facts: Facts) -> float:
    """Return the median bytes per second from the first request for data to the last tensor."""
    rates = [facts.model_bytes / s.transfer_s for s in samples if s.transfer_s > 0]
    return median(rates) if rates else 0.0


def _warm_wall(found: Samples) -> Claim:
    middle = found.median("warm/cached", WS_WARM, lambda outcome: outcome.load_s * 1000)
    name, target = "warm load, mapped, second process", "all tensors in < 100 ms"
    if middle is None:
        return missing(name, target, f"no samples of {WS_WARM}")
    return Claim(name, target, middle, 100, False, "ms", f"warm/cached: {WS_WARM}, load")


def _warm_touch(found: Samples, cell: str) -> Claim:
    name = f"touching every byte, {'page cache warm' if cell.endswith('cached') else 'evicted'}"
    theirs = found.median(cell, NATIVE, lambda outcome: outcome.load_s + outcome.checksum_s)
    ours = found.median(cell, WS_WARM, lambda outcome: outcome.load_s + outcome.checksum_s)
    basis = f"{cell}: {NATIVE} / {WS_WARM}, load and touch"
    return ratio(name, ">= 0.95 of safetensors load_file", (theirs, ours), 0.95, basis)


def _memory_of_load(found: Samples, facts: Facts) -> Claim:
    peaks = [
        s.outcome.rss_peak_bytes
        for label in (WS_OFF, WS_ON)
        for s in found.of(PLAIN, label)
        if s.outcome is not None
    ]
    return _memory("load", "model", peaks, facts.model_bytes, f"{WS_OFF} and on")


def _memory_of_stream(found: Samples) -> Claim:
    samples = found.of(PLAIN, WS_CONSUME)
    peaks = [s.outcome.rss_peak_bytes for s in samples if s.outcome is not None]
    return _memory("stream", "budget", peaks, STREAM_BUDGET_BYTES, WS_CONSUME)


def _memory(name: str, base: str, peaks: Sequence[int], bytes_: int, label: str) -> Claim:
    """Return the row for the whole process (VmHWM: interpreter, torch and all), largest sample."""
    title, target = f"peak memory, {name}", f"<= {base} + 300 MiB"
    if not peaks:
        return missing(title, target, f"no samples of {label} in {PLAIN}")
    over = (max(peaks) - bytes_) / MIB
    basis = f"{PLAIN}: {label}, VmHWM of the process - {base} ({bytes_ / MIB:.0f} MiB)"
    return Claim(title, target, over, 300, False, "MiB over", basis)


def _pair(found: Samples, facts: Facts) -> Claim:
    """Sum what the origin sent per round; the worst round counts."""
    name, target = "two processes, one cold store", "origin sends <= 1.05x the model"
    rounds: dict[int, int] = {}
    for sample in found.of(PAIR, WS_PAIR):
        rounds[sample.round] = rounds.get(sample.round, 0) + sample.wire_bytes
    if not rounds:
        return missing(name, target, f"no samples of {PAIR}")
    worst = max(rounds.values()) / facts.model_bytes
    return Claim(name, target, worst, 1.05, False, "x", f"{PAIR}: bytes sent / bytes of the files")


def _same_bytes(found: Samples) -> Claim:
    """Count the samples whose tensors differ from what safetensors (or the majority) read."""
    sums = [(s, s.outcome.checksum) for s in found.all if s.outcome is not None]
    kept = [(sample, text) for sample, text in sums if text]
    if not kept:
        return missing("all tensors equal", "0 samples differ", "no samples")
    native = [text for sample, text in kept if sample.label == NATIVE]
    texts = native or [text for _, text in kept]
    right = max(set(texts), key=texts.count)
    wrong = sum(text != right for _, text in kept)
    basis = f"{len(kept)} samples: name, dtype, shape and CRC64NVME of every tensor"
    return Claim("all tensors equal", "0 samples differ", wrong, 0, False, "samples", basis)
