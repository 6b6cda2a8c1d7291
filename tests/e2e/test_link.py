"""Real links: shaped to a rate, far away, cut and mended, cut for good."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.kit import jobs, models
from tests.kit.netns import Wire, wire
from tests.kit.processes import Outcome, run_python, start_python

MIB = 1 << 20
SIZE = 96 * MIB

LOAD = """
import os
from tests.kit.jobs import digest
from weightstream.errors import WeightstreamError
from weightstream.loader.api import load_with_report
told = []
def tell(progress):
    if progress.bytes_done > 20 << 20 and not told:
        told.append(True)
        emit("under way")
try:
    loaded = load_with_report(sys.argv[1], progress=tell)
except WeightstreamError as error:
    emit([type(error).__name__, str(error)])
    raise SystemExit(0)
report = loaded.report
emit([digest(loaded.tensors), report.bytes_total, report.first_byte_s, report.ready_s])
"""


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Wire]:
    """A server behind 0.5 Gbit/s with a model of 96 MiB: 1.7 s at the link's payload rate."""
    with wire(tmp_path / "s3", 0.5) as made:
        made.server.put_files("models/far", models.sharded(3, SIZE, seed="far"))
        yield made


@pytest.fixture(scope="module")
def right() -> str:
    return jobs.digest(models.tensors(models.sharded(3, SIZE, seed="far")))


def env(far: Wire, tmp_path: Path, **settings: object) -> dict[str, str]:
    given = {
        "store": tmp_path / "store",
        "store_min_free_bytes": 0,
        "stall_timeout_s": 1.0,
        "connect_timeout_s": 1.0,
        "deadline_s": 20.0,
    } | settings
    named = {f"WEIGHTSTREAM_{name.upper()}": str(value) for name, value in given.items()}
    return far.server.env | named


def load(far: Wire, tmp_path: Path, **settings: object) -> Outcome:
    return run_python(
        LOAD, "s3://models/far", env=env(far, tmp_path, **settings), prefix=far.client_prefix
    )


@pytest.mark.parametrize("write_back", ["on", "off"])
def test_the_link_is_used_whole(far: Wire, tmp_path: Path, right: str, write_back: str) -> None:
    """From the first byte to the last tensor; the benchmark says it exactly, on a quiet machine."""
    digest, size, first_byte_s, ready_s = load(far, tmp_path, write_back=write_back).value
    assert digest == right
    assert size / (ready_s - first_byte_s) >= 0.8 * far.link.payload_bytes_s


def test_a_distant_origin(far: Wire, tmp_path: Path, right: str) -> None:
    """40 ms away: the adaptive concurrency has to hide it."""
    far.delay(0.04)
    digest, size, first_byte_s, ready_s = load(far, tmp_path).value
    assert digest == right
    assert size / (ready_s - first_byte_s) >= 0.5 * far.link.payload_bytes_s


def test_a_cut_and_mended_link(far: Wire, tmp_path: Path, right: str) -> None:
    """Two seconds of silence in mid-load, twice as long as a stall: given up, asked again."""
    environment = env(far, tmp_path)
    with start_python(LOAD, "s3://models/far", env=environment, prefix=far.client_prefix) as child:
        child.wait_for(lambda: "under way" in child.values())
        far.cut()
        mend = threading.Timer(2.0, far.mend)
        mend.start()
        digest, *_ = child.result(60).value
        mend.join()
    assert digest == right


def test_a_link_cut_for_good(far: Wire, tmp_path: Path) -> None:
    environment = env(far, tmp_path, deadline_s=3.0)
    with start_python(LOAD, "s3://models/far", env=environment, prefix=far.client_prefix) as child:
        child.wait_for(lambda: "under way" in child.values())
        far.cut()
        cut_s = time.monotonic()
        kind, message = child.result(60).value
        assert time.monotonic() - cut_s < 20
    assert kind == "UnavailableError"
    assert "s3://models/far" in message
    assert far.server.host in message
