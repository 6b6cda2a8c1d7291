"""The targets are computed right: ratios, best settings, bounds, and what is missing is said."""

from dataclasses import replace

import pytest

from weightstream.bench.claims import PAIR, PLAIN, Claim, Facts, claims
from weightstream.bench.jobs import Outcome, Sample
from weightstream.bench.links import Link
from weightstream.bench.scenarios import (
    CURL_FILES,
    CURL_NULL,
    NATIVE,
    WS_CONSUME,
    WS_OFF,
    WS_ON,
    WS_PAIR,
    WS_WARM,
)
from weightstream.bench.summary import rows

GIB = 1 << 30
MIB = 1 << 20
FACTS = Facts(GIB)
ONE_GBIT = Link("1gbit", 1.0)


def outcome(load_s: float, **changes: object) -> Outcome:
    base = Outcome(
        import_s=1.0,
        load_s=load_s,
        first_tensor_s=load_s / 2,
        fault_s=0.0,
        checksum_s=0.1,
        cpu_s=load_s,
        rss_before_bytes=200 * MIB,
        rss_peak_bytes=1200 * MIB,
        started_at_s=100.0,
        ready_at_s=100.0 + load_s,
        tensors=3,
        size_bytes=GIB,
        checksum="aa",
        maps=False,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def sample(cell: str, label: str, load_s: float, number: int = 0, **changes: object) -> Sample:
    return Sample(cell, label, number, outcome(load_s, **changes))


def claim(name: str, *samples: Sample) -> Claim:
    return next(found for found in claims(samples, FACTS) if found.name.startswith(name))


def test_nothing_measured_is_neither_pass_nor_fail() -> None:
    rows_ = [row for row in claims((), FACTS) if row.measured is not None]
    assert rows_ == []
    assert all(row.passed is None and row.basis for row in claims((), FACTS))


def test_throughput_is_compared_with_the_best_setting_of_the_peer() -> None:
    found = claim(
        "cold, loopback HTTP, write-back off",
        sample(PLAIN, WS_OFF, 1.0),
        sample(PLAIN, "runai, defaults", 9.0),
        sample(PLAIN, "runai, concurrency 8", 2.5),
    )
    assert found.measured == pytest.approx(2.5)
    assert found.passed is False
    assert "runai, concurrency 8" in found.basis


def test_medians_decide_and_not_the_best_sample() -> None:
    ours = [sample(PLAIN, WS_OFF, s, n) for n, s in enumerate((0.1, 1.0, 2.0))]
    found = claim("cold, loopback HTTP, write-back off", *ours, sample(PLAIN, "runai, x", 3.0))
    assert found.measured == pytest.approx(3.0)
    assert found.passed is True


def test_less_cpu_means_at_most_a_third() -> None:
    ours, theirs = sample(PLAIN, WS_OFF, 1.0, cpu_s=0.5), sample(PLAIN, "runai, x", 9.0, cpu_s=1.4)
    found = claim("CPU s/GB", ours, theirs)
    assert found.measured == pytest.approx(0.5 / 1.4)
    assert found.passed is False
    assert claim("CPU s/GB", ours, sample(PLAIN, "runai, x", 9.0, cpu_s=1.6)).passed is True


def test_ceiling_takes_the_fastest_curl() -> None:
    found = claim(
        "against the raw ceiling",
        sample(PLAIN, WS_OFF, 1.0),
        sample(PLAIN, f"{CURL_FILES}, 1 x 8", 0.9),
        sample(PLAIN, f"{CURL_FILES}, 2 x 8", 0.7),
    )
    assert found.measured == pytest.approx(0.7)
    assert found.passed is False


def test_mapped_peers_pay_for_their_page_faults() -> None:
    mapped = sample(PLAIN, "runai, x", 1.0, maps=True, fault_s=0.5)
    assert (
        claim("cold, loopback HTTP, write-back off", sample(PLAIN, WS_OFF, 0.5), mapped).measured
        == 3
    )


def test_payload_rate_counts_from_the_first_request_for_data() -> None:
    seconds = GIB / ONE_GBIT.payload_bytes_s
    ours = replace(sample("cold/1gbit/http", WS_ON, seconds + 0.7), first_request_at_s=100.7)
    curl = replace(
        sample("cold/1gbit/http", f"{CURL_NULL}, 1 x 8", seconds), first_request_at_s=100.0
    )
    of_curl, of_theory = (
        row for row in claims((ours, curl), FACTS) if row.name.startswith("payload rate, 1 ")
    )
    assert of_curl.measured == pytest.approx(1.0)
    assert of_theory.measured == pytest.approx(1.0)


def test_memory_takes_the_largest_peak_of_the_whole_process() -> None:
    found = claim(
        "peak memory, load",
        sample(PLAIN, WS_OFF, 1.0, rss_peak_bytes=GIB + 100 * MIB),
        sample(PLAIN, WS_ON, 1.0, rss_peak_bytes=GIB + 301 * MIB),
    )
    assert found.measured == pytest.approx(301)
    assert found.passed is False
    budget = claim("peak memory, stream", sample(PLAIN, WS_CONSUME, 1.0, rss_peak_bytes=500 * MIB))
    assert budget.measured == pytest.approx(500 - 256)


def test_two_processes_are_summed_per_round_and_the_worst_counts() -> None:
    samples = [
        replace(sample(PAIR, WS_PAIR, 1.0, number), wire_bytes=wire)
        for number, wire in ((0, GIB), (0, 0), (1, GIB), (1, GIB // 10))
    ]
    found = claim("two processes", *samples)
    assert found.measured == pytest.approx(1.1)
    assert found.passed is False


def test_warm_touch_compares_load_and_touch_with_the_native_file() -> None:
    found = claim(
        "touching every byte, page cache warm",
        sample("warm/cached", NATIVE, 0.01, checksum_s=0.19),
        sample("warm/cached", WS_WARM, 0.02, checksum_s=0.23),
    )
    assert found.measured == pytest.approx(0.8)
    assert found.passed is False


def test_one_sample_with_other_bytes_fails_the_run() -> None:
    samples = [
        sample(PLAIN, "a", 1.0),
        sample(PLAIN, "b", 1.0),
        sample(PLAIN, "c", 1.0, checksum="bb"),
    ]
    found = claim("all tensors equal", *samples)
    assert found.measured == 1
    assert found.passed is False


def test_native_file_says_what_is_right_even_when_outnumbered() -> None:
    wrong = [sample(PLAIN, name, 1.0, checksum="bb") for name in "abc"]
    assert claim("all tensors equal", *wrong, sample("warm/cached", NATIVE, 1.0)).measured == 3


def test_rows_keep_failures_and_their_reason() -> None:
    failed = Sample(PLAIN, "a", 1, None, error="exit 1: no such thing")
    (row,) = rows((sample(PLAIN, "a", 2.0), failed))
    assert (row.count, row.failed, row.error) == (1, 1, "exit 1: no such thing")
    assert row.gb_s.middle == pytest.approx(GIB / 1e9 / 2)


def test_a_sample_survives_its_json() -> None:
    kept = replace(sample(PLAIN, "a", 2.0), wire_bytes=7)
    assert Sample.from_dict(kept.to_dict()) == kept
