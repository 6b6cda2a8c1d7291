"""Eviction from the page cache is real and seen by mincore; the server's log is read right."""

import os
from pathlib import Path

import pytest
import torch

from weightstream.bench import measure
from weightstream.bench.servers import parse_log
from weightstream.demo.checksum import checksum_of, fingerprint
from weightstream.demo.processes import clean_environment

SIZE = 8 << 20


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_evict_and_warm_are_seen_by_residency(on_disk: Path) -> None:
    measure.evict([on_disk])
    if measure.residency([on_disk]) > 0.5:
        pytest.skip("this file system lives in the page cache (tmpfs)")
    assert measure.residency([on_disk]) < 0.01
    measure.warm([on_disk])
    assert measure.residency([on_disk]) == 1.0


def test_evict_writes_dirty_pages_first(on_disk: Path) -> None:
    on_disk.write_bytes(b"x" * SIZE)
    measure.evict([on_disk])
    assert on_disk.read_bytes() == b"x" * SIZE


def test_files_that_are_just_being_written_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "orders").mkdir()
    for name in ("a.bin", "orders/b.json", "orders/b.json.7-ab.tmp"):
        (tmp_path / name).write_bytes(b"x")
    assert measure.files_under(tmp_path) == [tmp_path / "a.bin", tmp_path / "orders/b.json"]


def test_checksum_does_not_depend_on_order_but_on_every_byte() -> None:
    one, two = torch.arange(9, dtype=torch.bfloat16), torch.zeros(0)
    forward = checksum_of([fingerprint("a", one), fingerprint("b", two)])
    assert forward == checksum_of([fingerprint("b", two), fingerprint("a", one)])
    changed = one.clone()
    changed[8] = -8
    assert forward != checksum_of([fingerprint("a", changed), fingerprint("b", two)])
    assert forward != checksum_of([fingerprint("a", one.view(3, 3)), fingerprint("b", two)])


def test_log_sums_bytes_and_finds_the_first_data_request() -> None:
    found = parse_log(
        [
            "1000.500 0.100 200 300 500 GET /bench/",
            "1001.000 0.400 206 1000 1200 GET /bench/m/a.safetensors",
            "1001.200 0.900 206 1000 1200 GET /bench/m/b b.safetensors",
            "1001.300 0.000 200 0 250 HEAD /bench/m/a.safetensors",
        ]
    )
    assert (found.wire_bytes, found.body_bytes, found.requests) == (3150, 2300, 4)
    assert found.first_request_at_s == pytest.approx(1000.3)


def test_environment_of_a_sample_configures_nobody() -> None:
    dirty = {
        "PATH": "/bin",
        "AWS_PROFILE": "x",
        "https_proxy": "y",
        "RUNAI_X": "z",
        "NO_PROXY": "n",
    }
    assert clean_environment(dirty, "RUNAI_") == {"PATH": "/bin"}
