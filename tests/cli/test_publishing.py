"""`weightstream publish` and `verify`, as a user has them."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Cli, check
from tests.kit.faults import Latency, When
from tests.kit.models import sharded
from tests.kit.processes import Child
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server
from tests.p2p.manifest.conftest import make_keys

FILES = sharded(2, 4 << 20, seed="cli-publish")
SIZE = sum(map(len, FILES.values()))
SHARD = "model-00001-of-00002.safetensors"
URI = "s3://models/cli-publish"


@pytest.fixture(autouse=True)
def model(s3: S3Server) -> Path:
    """Put the model on the server, with nothing published."""
    folder = s3.root / "models/cli-publish"
    shutil.rmtree(folder, ignore_errors=True)
    s3.put_files("models/cli-publish", FILES)
    return folder


def test_publish_then_verify(s3_cli: Cli, model: Path) -> None:
    report = s3_cli.json("publish", URI)
    assert report["bytes_total"] == SIZE
    assert sorted(path.name for path in model.glob(".weightstream/*")) == [
        "manifest.json",
        "model.torrent",
    ]
    assert (
        json.loads((model / ".weightstream/manifest.json").read_bytes())["root"] == (report["root"])
    )
    found = s3_cli.json("verify", URI)
    assert found["ok"]
    assert found["bytes_checked"] == SIZE
    assert report["root"] in s3_cli("verify", URI).stdout


def test_mismatch_is_exit_5_and_named(s3_cli: Cli, s3: S3Server) -> None:
    s3_cli("publish", URI)
    data = bytearray(FILES[SHARD])
    data[(1 << 20) + 3] ^= 1
    s3.put(f"models/cli-publish/{SHARD}", bytes(data))
    s3.put("models/cli-publish/new.txt", b"?")
    said = s3_cli("verify", URI, code=5).stdout
    assert f"wrong: {SHARD}: chunk 1, bytes 1048576-" in said
    assert "not published: new.txt" in said
    assert f"of another version: {SHARD}" in said
    assert "NOT as published" in said
    assert [bad["chunk"] for bad in s3_cli.json("verify", URI, code=5)["wrong"]] == [1]


def test_local(s3_cli: Cli, tmp_path: Path) -> None:
    s3_cli("publish", URI, "--to", tmp_path / "out")
    manifest = tmp_path / "out/manifest.json"
    assert "not in the store: " in s3_cli("verify", URI, "--local", "--manifest", manifest).stdout
    s3_cli("prefetch", URI)
    s3_cli.env["AWS_ENDPOINT_URL"] = "http://127.0.0.1:1"  # nobody is asked
    found = s3_cli.json("verify", URI, "--local", "--manifest", manifest)
    assert found["ok"]
    assert (found["bytes_checked"], found["bytes_absent"]) == (SIZE, 0)


def test_keys(s3_cli: Cli, tmp_path: Path) -> None:
    keys, other = make_keys(tmp_path), make_keys(tmp_path, "other")
    assert s3_cli.json("publish", URI, "--key", keys.private)["signed"]
    assert f"signed by {keys.public}" in s3_cli("verify", URI, "--key", keys.public).stdout
    assert "not signed with" in s3_cli.error("verify", URI, "--key", other.public, code=5)
    assert "not an unencrypted" in s3_cli.error("publish", URI, "--key", keys.public, code=2)
    s3_cli.env["WEIGHTSTREAM_MANIFEST_KEY_FILE"] = str(other.public)
    assert "not signed with" in s3_cli.error("verify", URI, code=5)
    (tmp_path / "no.pem").write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0LXRleHQ=\n-----END")
    assert "c2Vj" not in s3_cli.error("publish", URI, "--key", tmp_path / "no.pem", code=2)


def test_what_cannot_be_published(s3_cli: Cli) -> None:
    assert "one file" in s3_cli.error("publish", f"{URI}/{SHARD}", code=2)
    assert "no object" in s3_cli.error("publish", "s3://models/nothing-at-all", code=3)
    assert "manifest.json" in s3_cli.error("verify", URI, code=3)
    s3_cli.env["AWS_SECRET_ACCESS_KEY"] = "another-secret-of-mine"
    assert "another-secret" not in s3_cli.error("publish", URI, code=3)


def test_place_that_cannot_be_written(s3_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in s3_cli.error(
        "publish", URI, "--to", tmp_path / "file/below", code=3
    )
    assert "NoSuchBucket" in s3_cli.error("publish", URI, "--to", "s3://no-such-bucket/x", code=3)


def test_store_that_cannot_be_used_is_left_out(s3_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/file").write_text("x")
    outcome = s3_cli("publish", URI, "--store", tmp_path / "foreign")
    assert "the store is left out" in outcome.stderr
    assert "root hash" in outcome.stdout


def test_ctrl_c_ends_it_and_nothing_is_written(
    s3_cli: Cli, proxy: FaultProxy, start: Callable[..., Child], model: Path
) -> None:

    proxy.add(When(ranged=True, times=None), Latency(30))
    s3_cli.env |= {"AWS_ENDPOINT_URL": proxy.url, "WEIGHTSTREAM_STALL_TIMEOUT_S": "60"}
    with start("publish", URI) as child:
        child.wait_for(lambda: any(e.range for e in proxy.exchanges()))
        os.kill(child.pid, signal.SIGINT)
        outcome = child.result(20)
    check(outcome)
    assert outcome.returncode == 130
    assert outcome.stderr.strip() == "weightstream: cancelled"
    assert not list(model.glob(".weightstream/*"))


@pytest.mark.slow
def test_prefetch_of_a_fine_tune_fetches_what_differs(
    s3_cli: Cli, s3: S3Server, proxy: FaultProxy
) -> None:
    tuned = {name: data[:-9] + b"fine-tune" for name, data in FILES.items() if len(data) > 99999}
    shutil.rmtree(s3.root / "models/cli-tuned", ignore_errors=True)
    s3.put_files("models/cli-tuned", tuned)
    s3_cli("publish", "s3://models/cli-tuned")
    s3_cli("prefetch", URI)
    s3_cli.env["AWS_ENDPOINT_URL"] = proxy.url
    [report] = s3_cli.json("prefetch", "s3://models/cli-tuned")
    size = sum(map(len, tuned.values()))
    sent = sum(e.body_bytes for e in proxy.exchanges() if e.range and ".safetensors" in e.path)
    assert report["bytes_reused"] == sum(len(data) >> 20 << 20 for data in tuned.values())
    assert sent == size - report["bytes_reused"]
    s3_cli("load", "s3://models/cli-tuned")
    assert s3_cli.json("verify", "s3://models/cli-tuned", "--local")["bytes_absent"] == 0
    s3_cli("evict", "s3://models/cli-tuned")
    assert "in other files" in s3_cli("prefetch", "s3://models/cli-tuned").stdout
