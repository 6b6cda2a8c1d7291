"""Loading, prefetching and looking after what is stored, against a real S3 server."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Cli, check
from tests.kit.faults import Stall, When
from tests.kit.models import sharded, tensors
from tests.kit.processes import Child
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server

FILES = sharded(2, 5 << 20, seed="cli")
SIZE = sum(map(len, FILES.values()))
URI = "s3://models/cli"


@pytest.fixture(autouse=True)
def model(s3: S3Server) -> None:
    """Put the model on the server."""
    s3.put_files("models/cli", FILES)


def data_file(store: Path) -> Path:
    """Return the largest data file of a store."""
    return max(store.rglob("*.data"), key=lambda path: path.stat().st_size)


def test_ls_lists_the_origin(s3_cli: Cli) -> None:
    report = s3_cli.json("ls", URI)
    assert {row["uri"]: row["size_bytes"] for row in report["files"]} == {
        f"{URI}/{name}": len(data) for name, data in FILES.items()
    }
    assert report["size_bytes"] == SIZE
    assert not any(row["stored_bytes"] for row in report["files"])
    assert "model-00001-of-00002.safetensors" in s3_cli("ls", URI).stdout


def test_prefetch_keeps_everything_then_nothing_is_fetched(s3_cli: Cli) -> None:
    [first] = s3_cli.json("prefetch", URI)
    assert first["bytes_total"] == first["bytes_fetched"] == SIZE
    assert first["files"] == len(FILES)
    [second] = s3_cli.json("prefetch", URI)
    assert second["bytes_fetched"] == 0
    status = s3_cli.json("status")
    [model] = status["models"]
    assert model["uri"] == URI
    assert model["stored_bytes"] == model["size_bytes"] == SIZE
    assert model["complete"]
    assert not model["in_use"]
    assert "100 %" in s3_cli("status").stdout


@pytest.mark.slow
def test_prefetched_model_loads_offline_and_mapped(s3_cli: Cli) -> None:
    s3_cli("prefetch", URI)
    s3_cli.env |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "WEIGHTSTREAM_DEADLINE_S": "1"}
    result = s3_cli.json("load", URI)
    names = tensors(FILES)
    assert result["report"]["tensors"] == len(names)
    assert set(result["report"]["bytes_by_source"]) == {"mapped"}
    assert "127.0.0.1:1" in s3_cli.error("load", URI, "--fresh", code=3)


def test_prefetch_fetches_only_what_is_missing(s3_cli: Cli, proxy: FaultProxy) -> None:
    s3_cli.env |= {"AWS_ENDPOINT_URL": proxy.url}
    s3_cli("prefetch", URI)
    with data_file(s3_cli.store).open("r+b") as data:
        data.seek((1 << 20) + 5)
        data.write(b"wrong")
    found = s3_cli.json("scrub", code=1)
    assert found["dropped_chunks"] == 1
    [damaged] = found["damaged_blobs"]
    [row] = [r for r in s3_cli.json("status", URI)["files"] if r["uri"] == damaged]
    assert row["stored_bytes"] == row["size_bytes"] - (1 << 20)
    assert not row["complete"]
    [report] = s3_cli.json("prefetch", URI)
    assert report["bytes_fetched"] == 1 << 20
    assert s3_cli.json("scrub")["dropped_chunks"] == 0


def test_prefetch_of_more_than_fits_fetches_nothing(s3_cli: Cli, proxy: FaultProxy) -> None:
    s3_cli.env |= {"AWS_ENDPOINT_URL": proxy.url}
    message = s3_cli.error("prefetch", URI, "-o", "store_max_bytes=2MiB", code=6)
    assert "does not fit" in message
    assert not [e for e in proxy.exchanges() if e.range]


def test_prefetch_refuses_what_makes_no_sense(s3_cli: Cli, tmp_path: Path) -> None:
    assert "write_back=on" in s3_cli.error("prefetch", URI, "-o", "write_back=off", code=2)
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert "on this machine" in s3_cli.error("prefetch", tmp_path, code=2)


def test_pinned_models_stay(s3_cli: Cli) -> None:
    s3_cli("prefetch", URI)
    assert len(s3_cli.json("pin", URI)["uris"]) == len(FILES)
    assert s3_cli.json("status")["models"][0]["pinned"]
    assert s3_cli.json("evict", "--free", "1000t")["uris"] == []
    s3_cli("unpin", URI)
    assert len(s3_cli.json("evict", "--free", "1000t")["uris"]) == len(FILES)
    assert s3_cli.json("status")["models"] == []


def test_evict_removes_one_model(s3_cli: Cli, s3: S3Server) -> None:
    s3.put_files("models/other", {"config.json": b"{}"})
    s3_cli("prefetch", URI, "s3://models/other")
    report = s3_cli.json("evict", URI)
    assert len(report["uris"]) == len(FILES)
    assert report["bytes"] >= SIZE
    assert [m["uri"] for m in s3_cli.json("status")["models"]] == ["s3://models/other"]
    for command in ("evict", "pin", "unpin"):
        assert "nothing under" in s3_cli.error(command, URI, code=6)


def test_load_reports_its_phases(s3_cli: Cli) -> None:
    report = s3_cli.json("load", URI)["report"]
    data = sum(t.numel() * t.element_size() for t in tensors(FILES).values())
    assert report["bytes_by_source"]["origin"] == report["bytes_total"] >= data
    assert 0 < report["resolve_s"] <= report["header_s"] <= report["ready_s"]
    assert report["first_byte_s"] <= report["last_byte_s"] <= report["ready_s"]
    warm = s3_cli("load", URI).stdout
    assert "mapped" in warm
    assert "tensors ready" in warm


def test_load_of_some_names(s3_cli: Cli) -> None:
    name = "layers.1.mlp.weight"
    report = s3_cli.json("load", URI, "--name", name, "--dtype", "float32")["report"]
    assert report["tensors"] == 1
    assert report["bytes_total"] < SIZE / 4


@pytest.mark.parametrize(
    ("uri", "code", "says"),
    [
        ("s3://models/nothing-here", 3, "no object is there"),
        ("s3://no-such-bucket/m", 3, "NoSuchBucket"),
        ("/no/such/path", 3, "/no/such/path"),
        ("s3://models/broken", 4, "s3://models/broken/model.safetensors"),
    ],
)
def test_what_cannot_be_loaded(s3_cli: Cli, s3: S3Server, uri: str, code: int, says: str) -> None:
    s3.put("models/broken/model.safetensors", b"\xff" * 100)
    assert says in s3_cli.error("load", uri, code=code)


def test_wrong_secret_is_exit_3_and_not_shown(s3_cli: Cli) -> None:
    s3_cli.env["AWS_SECRET_ACCESS_KEY"] = "another-secret-of-mine"
    line = s3_cli.error("load", URI, code=3)
    assert "another-secret-of-mine" not in line
    assert URI in line


def test_missing_credentials_are_exit_3(s3_cli: Cli) -> None:
    del s3_cli.env["AWS_ACCESS_KEY_ID"], s3_cli.env["AWS_SECRET_ACCESS_KEY"]
    assert "credentials" in s3_cli.error("ls", URI, code=3)


def test_unreachable_origin_is_exit_3(s3_cli: Cli) -> None:
    s3_cli.env["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"
    assert "127.0.0.1:1" in s3_cli.error("ls", URI, code=3)


def test_ctrl_c_in_mid_load_is_exit_130(
    s3_cli: Cli, proxy: FaultProxy, start: Callable[..., Child]
) -> None:
    proxy.add(When(ranged=True, times=None), Stall(60, after_bytes=100_000))
    s3_cli.env |= {"AWS_ENDPOINT_URL": proxy.url, "WEIGHTSTREAM_STALL_TIMEOUT_S": "30"}
    with start("prefetch", URI, "--json") as child:
        child.wait_for(lambda: any(e.range for e in proxy.exchanges()))
        os.kill(child.pid, signal.SIGINT)
        outcome = child.result(20)
    check(outcome)
    assert outcome.returncode == 130
    assert outcome.stderr.strip() == "weightstream: cancelled"
