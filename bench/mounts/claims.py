"""The targets of the mount, row by row, computed from the samples of one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from weightstream.bench.claims import MIB, Claim, Samples, missing, ratio, wall_s
from weightstream.bench.jobs import Sample
from weightstream.bench.mounts import plan
from weightstream.bench.mounts.plan import OURS
from weightstream.bench.mounts.tasks import MountFacts

Value = Callable[[Sample], int | None]
# By the beginnings of their labels: with and without a cache, whatever the setting.
_PEERS = (plan.RCLONE, plan.S3FS, plan.OURS_PYTHON)


@dataclass(frozen=True, slots=True)
class MountSizes:
    """What claims need beside the samples."""

    whole_bytes: int
    checksums: tuple[tuple[str, str], ...]  # (cell, digest of its native files)


def mount_claims(samples: Sequence[Sample], sizes: MountSizes) -> tuple[Claim, ...]:
    """Return all rows, in the order of the table."""
    found = Samples(samples)
    return (
        _native(found, plan.COMPLETE_READ, 0.93, "complete file, sequential read"),
        _native(found, plan.COMPLETE_MAP, 0.85, "complete file, mmap touch"),
        _most(
            found, (plan.COMPLETE_READ, plan.COMPLETE_MAP), _reads, 0,
            "complete file, READ requests", "0 reach the server", "requests",
        ),
        _faster(found, plan.COLD, 1.5, "cold sequential read, unshaped"),
        *_link(found, sizes),
        _raw(found),
        _faster(found, plan.TENSORS, 2.0, "safe_open + touch, 4 cold shards"),
        _finished(found),
        _native(found, plan.AGAIN_READ, 0.93, "second open, process restarted"),
        _native(found, plan.COMPLETE_READ, 0.93, "second open, mount restarted"),
        _most(
            found, (plan.AGAIN_READ, plan.COMPLETE_READ), lambda sample: sample.data_bytes, 0,
            "second open, bytes fetched", "0 bytes", "bytes",
        ),
        _eight(found, sizes),
        _listing(found),
        _most(
            found, (plan.FIND,), lambda sample: _facts(sample).most_lists, 1,
            "find, twice within the TTL", "no prefix is listed twice", "requests",
        ),
        _memory(found),
        _most(
            found, (plan.HOLD,), lambda sample: _facts(sample).gauges, 0,
            "500 open files, gauges afterwards", "0", "",
        ),
        _same_bytes(found, sizes),
    )  # fmt: skip


def _facts(sample: Sample) -> MountFacts:
    return sample.mount or MountFacts()


def _reads(sample: Sample) -> int | None:
    return _facts(sample).reads


def _native(found: Samples, cell: str, bound: float, name: str) -> Claim:
    ours, native = found.median(cell, OURS, wall_s), found.median(cell, plan.NATIVE, wall_s)
    target = f">= {bound:g} of the native file"
    return ratio(name, target, (native, ours), bound, f"{cell}: {plan.NATIVE} / {OURS}")


def _faster(found: Samples, cell: str, bound: float, name: str) -> Claim:
    """Compare with the best of all peers, the fuse-python driver included."""
    target = f">= {bound:g}x the best peer"
    best = [found.best(cell, beginning, wall_s) for beginning in _PEERS]
    peers = [one for one in best if one is not None]
    if not peers:
        return missing(name, target, f"no samples of peers in {cell}")
    label, theirs = min(peers, key=lambda one: one[1])
    return ratio(
        name, target, (theirs, found.median(cell, OURS, wall_s)), bound, f"{cell}: {label} / {OURS}"
    )


def _link(found: Samples, sizes: MountSizes) -> tuple[Claim, Claim]:
    """Return two rows: against what curl reached over the link, and against arithmetic."""
    cell = plan.COLD_LINK
    name, target = "cold sequential read, 5 Gbit/s", ">= 90 % of the link"
    ours, raw = found.median(cell, OURS, wall_s), found.best(cell, plan.CURL, wall_s)
    least_s = sizes.whole_bytes / plan.LINK.payload_bytes_s
    return (
        ratio(
            f"{name}, of curl", target, (raw and raw[1], ours), 0.9, f"{cell}: {plan.CURL} / {OURS}"
        ),
        ratio(
            f"{name}, of theory", target, (least_s, ours), 0.9,
            f"{cell}: (rate x 1448/1514) / {OURS}",
        ),
    )  # fmt: skip


def _raw(found: Samples) -> Claim:
    parts = found.median(plan.TENSORS, OURS, wall_s), found.median(plan.SHARDS, OURS, wall_s)
    basis = f"{plan.TENSORS} / {plan.SHARDS}: {OURS}"
    target = "<= 1.2x a raw sequential read of the same"
    return ratio("safe_open + touch, 4 cold shards", target, parts, 1.2, basis, at_least=False)


def _finished(found: Samples) -> Claim:
    """Count the samples that failed or were given up."""
    name, target = "64 threads fault at once", "every sample finishes"
    samples = [s for s in found.all if s.cell == plan.THREADS and s.label == OURS]
    if not samples:
        return missing(name, target, f"no samples of {plan.THREADS}")
    failed = sum(sample.outcome is None for sample in samples)
    basis = f"{plan.THREADS}: {len(samples)} samples of {OURS}, failed or timed out"
    return Claim(name, target, failed, 0, False, "samples", basis)


def _eight(found: Samples, sizes: MountSizes) -> Claim:
    """Sum what the origin sent per round; the worst round counts."""
    name, target = "8 processes read one cold file", "origin sends <= 1.05x the file"
    rounds: dict[int, int] = {}
    for sample in found.of(plan.EIGHT, OURS):
        rounds[sample.round] = rounds.get(sample.round, 0) + sample.wire_bytes
    if not rounds:
        return missing(name, target, f"no samples of {plan.EIGHT}")
    worst = max(rounds.values()) / sizes.whole_bytes
    return Claim(name, target, worst, 1.05, False, "x", f"{plan.EIGHT}: bytes sent / file")


def _listing(found: Samples) -> Claim:
    cell = plan.LIST
    ours, best = found.median(cell, OURS, wall_s), found.best(cell, plan.S3FS, wall_s)
    basis = f"{cell}: {plan.S3FS} / {OURS}"
    name = "ls -lR of 10,000 objects, warm"
    return ratio(name, ">= 5x s3fs-fuse", (best and best[1], ours), 5.0, basis)


def _memory(found: Samples) -> Claim:
    name, target = "500 open files, 64 readers: server RSS", "<= budget + 150 MiB"
    peaks = [_facts(s).server_rss_bytes for s in found.of(plan.HOLD, OURS)]
    if not peaks:
        return missing(name, target, f"no samples of {plan.HOLD}")
    over = (max(peaks) - plan.BUDGET_BYTES) / MIB
    basis = f"{plan.HOLD}: VmHWM of all processes - budget ({plan.BUDGET_BYTES / MIB:.0f} MiB)"
    return Claim(name, target, over, 150, False, "MiB over", basis)


def _most(
    found: Samples, cells: Sequence[str], value: Value, bound: int, name: str, target: str,
    unit: str,
) -> Claim:  # fmt: skip
    """Return the row for the largest of a count over our samples."""
    samples = [sample for cell in cells for sample in found.of(cell, OURS)]
    values = [one for sample in samples if (one := value(sample)) is not None]
    basis = f"{', '.join(cells)}: the most of {len(values)} samples"
    if not values:
        return missing(name, target, f"no samples: {', '.join(cells)}")
    return Claim(name, target, max(values), bound, False, unit, basis)


def _same_bytes(found: Samples, sizes: MountSizes) -> Claim:
    """Count the samples that read other bytes than are in the native files."""
    right = dict(sizes.checksums)
    kept = [
        (s.outcome.checksum, right[s.cell])
        for s in found.all
        if s.outcome is not None and s.outcome.checksum and s.cell in right
    ]
    if not kept:
        return missing("all bytes equal", "0 samples differ", "no samples")
    wrong = sum(ours != native for ours, native in kept)
    basis = f"{len(kept)} samples: name, size and CRC64NVME of every file"
    return Claim("all bytes equal", "0 samples differ", wrong, 0, False, "samples", basis)
