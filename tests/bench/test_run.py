"""One tiny run end to end: server, fresh processes, equal bytes, failures kept, files written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from weightstream.bench.__main__ import main
from weightstream.bench.certificates import make_certificates
from weightstream.bench.claims import PAIR
from weightstream.bench.jobs import Sample
from weightstream.bench.links import LOOPBACK
from weightstream.bench.mounts.plan import AGAIN_READ, FIND, NATIVE, OURS
from weightstream.bench.scenarios import SCENARIOS, WS_PAIR, WS_WARM, cells
from weightstream.bench.servers import Traffic, nginx, parse_log
from weightstream.cachefs.fuse.supervisor.starting import why_not_kernel

needs_nginx = pytest.mark.skipif(
    not (shutil.which("nginx") or os.path.exists("/usr/sbin/nginx")), reason="needs nginx-light"
)


def samples_of(folder: Path) -> tuple[list[Sample], dict[str, Any]]:
    (report,) = (folder / "results").glob("*/report.json")
    values = json.loads(report.read_text())
    return [Sample.from_dict(sample) for sample in values["samples"]], values


@needs_nginx
@pytest.mark.slow
def test_two_peers_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "16MiB", "--repeat", "1", "--links", "loopback"]
    arguments += ["--peers", "weightstream,safetensors_file", "--cells", "pair,warm/cached"]
    main([*arguments, "--out", str(tmp_path)])
    samples, values = samples_of(tmp_path)
    assert [sample.error for sample in samples if sample.outcome is None] == []
    pair = [sample for sample in samples if sample.label == WS_PAIR]
    assert [sample.cell for sample in pair] == [PAIR, PAIR]
    sizes = [sample.outcome.size_bytes for sample in pair if sample.outcome is not None]
    assert sizes[0] <= pair[0].body_bytes < 1.1 * sizes[0]
    assert pair[0].stored_bytes >= sizes[0]
    (warm,) = (sample for sample in samples if sample.label == WS_WARM)
    assert (warm.wire_bytes, warm.requests) == (0, 0)
    assert warm.resident > 0.99
    claims = {claim["name"]: claim for claim in values["claims"]}
    assert claims["all tensors equal"]["passed"] is True
    assert claims["cold, loopback HTTPS"]["passed"] is None
    assert "Targets" in capsys.readouterr().out
    assert list(tmp_path.glob("results/*/warm.png"))
    assert not (tmp_path / "work").exists()


@needs_nginx
@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(450)
@pytest.mark.skipif(bool(why_not_kernel()), reason="needs root and /dev/fuse")
@pytest.mark.skipif(not shutil.which("fusermount3"), reason="needs fuse3")
def test_mounts_end_to_end(tmp_path: Path) -> None:
    """In a process of its own: a run enters a mount namespace and stays there."""
    arguments = ["mount", "--size", "16MiB", "--repeat", "1", "--links", "loopback"]
    arguments += ["--peers", "native,weightstream", "--cells", "again,find"]
    command = [sys.executable, "-m", "weightstream.bench", *arguments, "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode in (0, 1), result.stderr
    samples, values = samples_of(tmp_path)
    assert [sample.error for sample in samples if sample.outcome is None] == []
    assert {s.label for s in samples if s.cell == AGAIN_READ} >= {NATIVE, OURS}
    assert {sample.data_bytes for sample in samples if sample.label == OURS} == {0}
    assert {s.outcome.tensors for s in samples if s.cell == FIND and s.outcome} == {10_000}
    claims = {claim["name"]: claim for claim in values["claims"]}
    for name in ("all bytes equal", "second open, bytes fetched", "find, twice within the TTL"):
        assert claims[name]["passed"] is True
    assert claims["8 processes read one cold file"]["passed"] is None
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


@needs_nginx
def test_server_answers_like_s3(tmp_path: Path) -> None:
    import s3fs

    data = os.urandom(100_000)
    path = tmp_path / "root" / "bench" / "m" / "a.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    certificates = make_certificates(tmp_path / "tls", ("127.0.0.1",))
    with nginx(tmp_path / "root", "bench", tmp_path / "nginx", certificates) as server:
        mark = server.mark()
        filesystem = s3fs.S3FileSystem(
            key="k", secret="s", endpoint_url=server.endpoint(tls=False), skip_instance_cache=True
        )
        (listed,) = filesystem.ls("bench/m", detail=True)
        there = filesystem.info("bench/m/a.safetensors")["ETag"]
        assert (listed["size"], listed["ETag"]) == (len(data), there)
        assert filesystem.cat_file("bench/m/a.safetensors", start=5, end=50) == data[5:50]
        with pytest.raises(FileNotFoundError):
            filesystem.info("bench/m/b")
        traffic = server.traffic(mark)
        assert traffic.body_bytes > traffic.data_bytes == 45
        assert traffic.lists >= traffic.most_lists >= 1


def test_log_tells_listings_from_data() -> None:
    lines = [
        "10.5 0.5 206 100 150 GET /bench/a.safetensors",
        "11.0 0.0 200 30 60 GET /.listings/3.xml",
        "11.0 0.0 200 30 60 GET /.listings/3.xml",
        "11.0 0.0 200 20 50 GET /.listings/none",
        "11.0 0.0 404 10 40 GET /.listings/missing",
        "11.0 0.0 200 0 40 HEAD /bench/a.safetensors",
    ]
    assert parse_log(lines) == Traffic(400, 190, 6, 10.0, 3, 2, 100)


def test_unknown_peer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--peers", "curl,wget", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip() == "bench: --peers: no such peer: wget"


def test_every_label_is_of_one_variant_per_cell() -> None:
    for cell in cells(SCENARIOS, (LOOPBACK,)):
        labels = [variant.label for variant in cell.variants]
        assert len(labels) == len(set(labels))
