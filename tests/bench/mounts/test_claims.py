"""The targets of mounts are computed right, and what is missing is said."""

from dataclasses import replace

import pytest

from weightstream.bench.claims import Claim
from weightstream.bench.jobs import Outcome, Sample
from weightstream.bench.mounts import plan
from weightstream.bench.mounts.claims import MountSizes, mount_claims
from weightstream.bench.mounts.plan import NATIVE, OURS, OURS_PYTHON
from weightstream.bench.mounts.tasks import MountFacts

MIB = 1 << 20
GIB = 1 << 30
SIZES = MountSizes(GIB, ((plan.COLD, "right"),))


def sample(cell: str, label: str, wall_s: float = 1.0, number: int = 0, **more: object) -> Sample:
    outcome = Outcome(0, wall_s, 0, 0, 0, 0, 0, 0, 0, 0, 1, GIB, "", False)
    return replace(Sample(cell, label, number, outcome), **more)  # type: ignore[arg-type]


def claim(name: str, *samples: Sample) -> Claim:
    return next(c for c in mount_claims(samples, SIZES) if name in f"{c.name}: {c.target}")


def test_nothing_measured_is_neither_pass_nor_fail() -> None:
    rows = mount_claims((), SIZES)
    assert [row.passed for row in rows] == [None] * len(rows)
    assert all(row.basis for row in rows)


@pytest.mark.parametrize(
    ("name", "cell", "bound"),
    [
        ("complete file, sequential read", plan.COMPLETE_READ, 0.93),
        ("complete file, mmap touch", plan.COMPLETE_MAP, 0.85),
        ("second open, process restarted", plan.AGAIN_READ, 0.93),
        ("second open, mount restarted", plan.COMPLETE_READ, 0.93),
    ],
)
def test_native_file_sets_the_bound(name: str, cell: str, bound: float) -> None:
    native = sample(cell, NATIVE, 1.0)
    assert claim(name, native, sample(cell, OURS, 1 / bound - 0.001)).passed is True
    assert claim(name, native, sample(cell, OURS, 1 / bound + 0.001)).passed is False


def test_one_read_that_reaches_the_server_fails_the_row() -> None:
    quiet = sample(plan.COMPLETE_READ, OURS, mount=MountFacts(reads=0))
    loud = sample(plan.COMPLETE_MAP, OURS, mount=MountFacts(reads=1))
    assert claim("READ requests", quiet).passed is True
    assert claim("READ requests", quiet, loud).passed is False
    assert claim("READ requests", sample(plan.COMPLETE_READ, OURS)).passed is None


@pytest.mark.parametrize("best", ["rclone, cache, x", "s3fs-fuse, y", OURS_PYTHON])
def test_cold_read_is_compared_with_the_best_of_all_peers(best: str) -> None:
    others = [sample(plan.COLD, f"rclone, {n}", 9.0) for n in range(3)]
    found = claim("unshaped", *others, sample(plan.COLD, best, 3.0), sample(plan.COLD, OURS, 2.0))
    assert found.measured == pytest.approx(1.5)
    assert found.passed is True
    assert best in found.basis


def test_link_counts_from_open_to_last_byte() -> None:
    least_s = GIB / plan.LINK.payload_bytes_s
    ours = sample(plan.COLD_LINK, OURS, least_s / 0.9)
    curl = sample(plan.COLD_LINK, "curl to /dev/null, 8 connections", least_s)
    assert claim("of theory", ours).measured == pytest.approx(0.9)
    assert claim("of curl", ours, curl).measured == pytest.approx(0.9)


def test_safetensors_is_compared_with_raw_read_and_with_peers() -> None:
    ours = sample(plan.TENSORS, OURS, 1.3)
    raw = sample(plan.SHARDS, OURS, 1.0)
    assert claim("raw sequential", ours, raw).measured == pytest.approx(1.3)
    assert claim("raw sequential", ours, raw).passed is False
    peer = sample(plan.TENSORS, "s3fs-fuse, x", 2.6)
    assert claim("safe_open + touch, 4 cold shards: >= 2", ours, peer).passed is True


def test_hung_threads_fail_the_row() -> None:
    good = sample(plan.THREADS, OURS)
    hung = Sample(plan.THREADS, OURS, 1, None, "timed out")
    assert claim("64 threads", good).passed is True
    assert claim("64 threads", good, hung).measured == 1


def test_fetching_once_more_is_counted_by_data_and_not_by_listings() -> None:
    listed = sample(plan.AGAIN_READ, OURS, wire_bytes=900, data_bytes=0)
    assert claim("bytes fetched", listed).passed is True
    assert (
        claim("bytes fetched", listed, sample(plan.COMPLETE_READ, OURS, data_bytes=1)).passed
        is False
    )


def test_eight_readers_are_summed_per_round_and_the_worst_counts() -> None:
    samples = [
        sample(plan.EIGHT, OURS, number=0, wire_bytes=GIB),
        sample(plan.EIGHT, OURS, number=1, wire_bytes=int(GIB * 1.1)),
    ]
    assert claim("8 processes", *samples).measured == pytest.approx(1.1)


def test_listing_is_compared_with_s3fs() -> None:
    theirs = sample(plan.LIST, "s3fs-fuse, 16 x 16 MiB", 0.5)
    assert claim("ls -lR", sample(plan.LIST, OURS, 0.1), theirs).passed is True
    assert claim("ls -lR", sample(plan.LIST, OURS, 0.11), theirs).passed is False


def test_a_prefix_listed_twice_fails_the_row() -> None:
    once = sample(plan.FIND, OURS, mount=MountFacts(lists=101, most_lists=1))
    twice = sample(plan.FIND, OURS, mount=MountFacts(lists=102, most_lists=2))
    assert claim("find", once).passed is True
    assert claim("find", once, twice).passed is False


def test_memory_is_over_the_budget_and_gauges_end_at_zero() -> None:
    rss = plan.BUDGET_BYTES + 151 * MIB
    found = sample(plan.HOLD, OURS, mount=MountFacts(server_rss_bytes=rss, gauges=2))
    assert claim("server RSS", found).measured == pytest.approx(151)
    assert claim("server RSS", found).passed is False
    assert claim("gauges", found).measured == 2


def summed(label: str, checksum: str) -> Sample:
    found = sample(plan.COLD, label)
    assert found.outcome is not None
    return replace(found, outcome=replace(found.outcome, checksum=checksum))


def test_other_bytes_fail_the_run() -> None:
    assert claim("all bytes", summed(OURS, "right")).passed is True
    assert claim("all bytes", summed(OURS, "right"), summed("rclone, x", "wrong")).measured == 1
