"""What is known of a chunk: asked for once, aside, and never waited for longer than said."""

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3
from tests.conftest import LogWatch, SettingsFactory
from tests.kit.faults import Latency, Status, When
from tests.kit.models import sharded
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server
from tests.p2p.manifest.conftest import Keys, publish_once

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import open_origin
from weightstream.p2p.manifest import known as module
from weightstream.p2p.manifest import publish
from weightstream.p2p.manifest.known import Manifests, folders_above
from weightstream.settings import Settings

MIB = 1 << 20
FILES = {**sharded(2, 3 * MIB, seed="known"), "part/deep/weights.bin": b"w" * 1000}
SHARD = "model-00001-of-00002.safetensors"
URI = "s3://models/known"


@pytest.fixture(autouse=True)
def model(s3: S3Server, s3_env: dict[str, str], settings: Settings) -> Path:
    folder = s3.root / "models/known"
    shutil.rmtree(folder, ignore_errors=True)
    s3.put_files("models/known", FILES)
    publish_once(s3, URI, settings)
    return folder


@pytest.fixture
def blobs(settings: Settings) -> dict[str, Blob]:
    origin = open_origin(URI, settings)
    listing = origin.list(URI)
    origin.close()
    return {blob.uri.removeprefix(f"{URI}/"): blob for blob in listing}


def test_digests_of_a_published_model(settings: Settings, blobs: dict[str, Blob]) -> None:
    known = Manifests(settings, wait_s=10)
    assert known.digest(blobs[SHARD], MIB, 1) == blake3(FILES[SHARD][MIB:][:MIB]).digest()
    assert known.digest(blobs[SHARD], MIB, 7) is None
    assert known.digest(blobs[SHARD], 2 * MIB, 0) is None
    assert known.digest(replace(blobs[SHARD], version="other"), MIB, 0) is None


def test_file_in_a_folder_of_the_model(settings: Settings, blobs: dict[str, Blob]) -> None:
    known = Manifests(settings, wait_s=10)
    assert known.digest(blobs["part/deep/weights.bin"], MIB, 0) == blake3(b"w" * 1000).digest()


def test_asked_once_by_many_threads(
    settings: Settings, blobs: dict[str, Blob], proxy: FaultProxy
) -> None:
    known = Manifests(settings, wait_s=10)
    found: list[bytes | None] = []
    before = len(proxy.exchanges())

    def ask() -> None:
        for i in (0, 1):
            found.append(known.digest(blobs[SHARD], MIB, i))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 16
    assert None not in found
    once = len(proxy.exchanges()) - before
    Manifests(settings, wait_s=10).digest(blobs[SHARD], MIB, 0)
    assert len(proxy.exchanges()) - before == 2 * once


def test_absent_is_remembered_for_a_while(
    settings: Settings,
    blobs: dict[str, Blob],
    proxy: FaultProxy,
    model: Path,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3.delete("models/known/.weightstream/manifest.json")
    known = Manifests(settings, wait_s=10)
    assert known.digest(blobs[SHARD], MIB, 0) is None
    count = len(proxy.exchanges())
    assert known.digest(blobs[SHARD], MIB, 1) is None
    assert len(proxy.exchanges()) == count
    publish(URI, settings)
    assert known.digest(blobs[SHARD], MIB, 0) is None
    monkeypatch.setattr(module, "AGAIN_S", 0.0)
    assert known.digest(blobs[SHARD], MIB, 0) == blake3(FILES[SHARD][:MIB]).digest()


def test_published_again_in_another_version(
    settings: Settings,
    blobs: dict[str, Blob],
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = Manifests(settings, wait_s=10)
    assert known.digest(blobs[SHARD], MIB, 0) is not None
    s3.put(f"models/known/{SHARD}", FILES[SHARD][::-1])
    publish(URI, settings)
    origin = open_origin(URI, settings)
    [new] = origin.list(f"{URI}/{SHARD}")
    origin.close()
    assert known.digest(new, MIB, 0) is None
    assert known.digest(blobs[SHARD], MIB, 0) is not None
    monkeypatch.setattr(module, "AGAIN_S", 0.0)
    assert known.digest(new, MIB, 0) == blake3(FILES[SHARD][::-1][:MIB]).digest()


def test_slow_origin_is_waited_for_once(
    settings: Settings, blobs: dict[str, Blob], proxy: FaultProxy
) -> None:
    """Bounded waits, and the answer counts when it comes: no chunk waits for the origin's time."""
    proxy.add(When(times=None), Latency(1.5))
    known = Manifests(settings, wait_s=0.1)
    begun = time.monotonic()
    for i in range(50):
        assert known.digest(blobs[SHARD], MIB, i % 2) is None
    assert time.monotonic() - begun < 1.5
    proxy.clear()
    until = time.monotonic() + 20
    while known.digest(blobs[SHARD], MIB, 0) is None:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("status", [403, 500])
def test_origin_that_refuses(
    store_settings: SettingsFactory, blobs: dict[str, Blob], proxy: FaultProxy, status: int
) -> None:
    proxy.add(When(times=None), Status(status, "AccessDenied" if status == 403 else ""))
    settings = store_settings(deadline_s=1.5)
    assert Manifests(settings, wait_s=15).digest(blobs[SHARD], MIB, 0) is None


def test_spoilt_manifest_counts_as_none(
    settings: Settings, blobs: dict[str, Blob], s3: S3Server, expect_log: LogWatch
) -> None:
    s3.put("models/known/.weightstream/manifest.json", b"[]")
    expect_log("a manifest is ignored: .*not a manifest")
    assert Manifests(settings, wait_s=10).digest(blobs[SHARD], MIB, 0) is None


def test_signature_where_a_key_is_configured(
    store_settings: SettingsFactory, blobs: dict[str, Blob], keys: Keys, expect_log: LogWatch
) -> None:
    settings = store_settings(manifest_key_file=str(keys.public))
    expect_log("is not signed")
    assert Manifests(settings, wait_s=10).digest(blobs[SHARD], MIB, 0) is None
    publish(URI, settings, key=keys.private)
    assert Manifests(settings, wait_s=10).digest(blobs[SHARD], MIB, 0) is not None


def test_memory_is_bounded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_FOLDERS", 3)
    known = Manifests(settings, wait_s=0)
    for i in range(10):
        known.digest(Blob(f"memory://nowhere/{i}/x", 5, "v"), MIB, 0)
    assert len(known._answers) == 3


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("s3://b/m/part", ["s3://b/m/part", "s3://b/m", "s3://b"]),
        ("s3://b", ["s3://b"]),
        ("https://h/m", ["https://h/m"]),
        ("https://h/a/m", ["https://h/a/m", "https://h/a"]),
        ("file:///data/m", ["file:///data/m", "file:///data"]),
        ("s3://b/1/2/3/4/5", [f"s3://b/{'/'.join('12345'[:n])}" for n in (5, 4, 3, 2)]),
    ],
)
def test_folders_that_may_be_the_model(folder: str, above: list[str]) -> None:
    assert folders_above(folder) == above
