"""What the store has under another name is copied, and the origin sends only what differs."""

import os
import shutil
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from awscrt import checksums
from tests.conftest import LogWatch, SettingsFactory
from tests.kit.models import random_bytes
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server
from tests.p2p.manifest.conftest import Keys, publish_once

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.prefetch import prefetch
from weightstream.cachefs.store import Store, StoredBlob
from weightstream.p2p.manifest import Manifest, publish
from weightstream.p2p.manifest.parse import encode, parse
from weightstream.p2p.manifest.reuse import Reused, confirm, reuse, reuse_model
from weightstream.p2p.manifest.same import same_chunks
from weightstream.settings import Settings

MIB = 1 << 20
BASE = {
    "model-1.safetensors": random_bytes(6 * MIB + 1000, "base-1"),
    "model-2.safetensors": random_bytes(3 * MIB, "base-2"),
}
# The fine-tune changed one chunk of the first file, and the last bytes; the second is the same.
TUNED = {
    "model-1.safetensors": (
        BASE["model-1.safetensors"][: 2 * MIB]
        + random_bytes(MIB, "tuned")
        + BASE["model-1.safetensors"][3 * MIB : -10]
        + b"0123456789"
    ),
    "model-2.safetensors": BASE["model-2.safetensors"],
    "config.json": b"{}",
}
SAME = 5 * MIB + 3 * MIB
BASE_URI, URI = "s3://models/base", "s3://models/tuned"


@pytest.fixture(autouse=True)
def models(s3: S3Server, s3_env: dict[str, str], settings: Settings, proxy: FaultProxy) -> None:
    """Put both models on the server, the fine-tune published."""
    for name, files in (("base", BASE), ("tuned", TUNED)):
        shutil.rmtree(s3.root / "models" / name, ignore_errors=True)
        s3.put_files(f"models/{name}", files)
    publish_once(s3, URI, settings)


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """A store that has the base."""
    with Store.open(settings) as opened:
        prefetch(BASE_URI, settings, opened)
        yield opened


def manifest_of(s3: S3Server) -> Manifest:
    body = (s3.root / "models/tuned/.weightstream/manifest.json").read_bytes()
    return parse(body, URI)


def blob_of(manifest: Manifest, name: str) -> Blob:
    file = manifest.file(name)
    assert file is not None
    return Blob(f"{URI}/{name}", file.size, file.version)


def sent_bytes(proxy: FaultProxy) -> int:
    """Return what the origin has sent of the fine-tune's files."""
    return sum(
        e.body_bytes
        for e in proxy.exchanges()
        if e.range and "/tuned/" in e.path and ".weightstream" not in e.path
    )


def data_of(store: Store, uri: str) -> tuple[Path, StoredBlob]:
    [info] = [info for info in store.blobs() if info.blob.uri == uri]
    with store.open_blob(info.blob) as stored:
        return stored.data_path, stored


def test_origin_sends_only_what_differs(
    settings: Settings, store: Store, proxy: FaultProxy
) -> None:
    before = sent_bytes(proxy)
    reused = reuse_model(URI, settings, store)
    assert reused.bytes == SAME
    assert sent_bytes(proxy) == before
    report = prefetch(URI, settings, store)
    assert confirm(reused, settings, store)
    assert sent_bytes(proxy) - before == sum(map(len, TUNED.values())) - SAME
    assert report.bytes_total >= sum(map(len, TUNED.values()))
    for name, data in TUNED.items():
        [info] = [info for info in store.blobs() if info.blob.uri == f"{URI}/{name}"]
        with store.open_blob(info.blob) as stored:
            assert stored.complete
            assert stored.map()[:] == data
            assert stored.crc64(0) == checksums.crc64nvme(data[:MIB])
    assert store.scrub().dropped_chunks == 0


def test_same_chunks_are_named(store: Store, s3: S3Server) -> None:
    manifest = manifest_of(s3)
    blob = blob_of(manifest, "model-1.safetensors")
    found = same_chunks([blob], store, manifest)[blob]
    assert {(one.chunk, one.source.uri, one.source_chunk) for one in found} == {
        (i, f"{BASE_URI}/model-1.safetensors", i) for i in (0, 1, 3, 4, 5)
    }
    assert sum(one.length for one in found) == 5 * MIB
    assert reuse(blob, store, manifest) == 5 * MIB
    assert same_chunks([blob], store, manifest) == {}
    assert reuse(blob, store, manifest) == 0


def test_whole_file_is_complete_at_once(store: Store, s3: S3Server) -> None:
    manifest = manifest_of(s3)
    blob = blob_of(manifest, "model-2.safetensors")
    assert reuse(blob, store, manifest) == 3 * MIB
    with store.open_blob(blob) as stored:
        assert stored.complete


def test_other_version_of_the_wanted_file(store: Store, s3: S3Server) -> None:
    """The manifest is about one version; of another it knows nothing."""
    manifest = manifest_of(s3)
    blob = blob_of(manifest, "model-2.safetensors")
    other = Blob(blob.uri, blob.size, "another")
    assert same_chunks([other], store, manifest) == {}
    assert reuse(other, store, manifest) == 0
    assert store.find_blob(other) is None


def test_wrong_bytes_in_the_source_are_not_copied(
    settings: Settings, store: Store, s3: S3Server, expect_log: LogWatch
) -> None:
    """The store trusts a file that it sealed; a copy is hashed all the same."""
    path, _ = data_of(store, f"{BASE_URI}/model-2.safetensors")
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(MIB + 5)
        file.write(b"wrong")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    expect_log("wrong|does not match|was changed")
    reused = reuse_model(URI, settings, store)
    assert reused.bytes == SAME - MIB
    prefetch(URI, settings, store)
    with store.open_blob(blob_of(manifest_of(s3), "model-2.safetensors")) as stored:
        assert stored.map()[:] == TUNED["model-2.safetensors"]


def test_chunk_that_somebody_fetches_is_left_to_him(store: Store, s3: S3Server) -> None:
    manifest = manifest_of(s3)
    blob = blob_of(manifest, "model-2.safetensors")
    with store.open_blob(blob) as stored:
        assert stored.try_lock(1)
        assert reuse(blob, store, manifest) == 2 * MIB
        stored.unlock(1)
        assert [len(extent) for extent in stored.holes()] == [MIB]


def test_lying_manifest_is_found_out_by_the_origins_checksum(
    settings: Settings, store: Store, s3: S3Server, proxy: FaultProxy, expect_log: LogWatch
) -> None:
    """A manifest that passes the base off as the fine-tune: nothing of it stays in the store."""
    truth = manifest_of(s3)
    publish(BASE_URI, settings)
    base = parse((s3.root / "models/base/.weightstream/manifest.json").read_bytes(), BASE_URI)
    lie = base.file("model-1.safetensors")
    assert lie is not None
    files = tuple(
        replace(file, digests=lie.digests) if file.path == lie.path else file
        for file in truth.files
    )
    body = encode(replace(truth, files=files))
    s3.put("models/tuned/.weightstream/manifest.json", body)
    for name, data in TUNED.items():
        crc = b64encode(checksums.crc64nvme(data).to_bytes(8, "big")).decode()
        proxy.checksums[f"/models/tuned/{name}"] = ("x-amz-checksum-crc64nvme", crc)
    reused = reuse_model(URI, settings, store)
    prefetch(URI, settings, store)
    expect_log("the manifest of .*model-1.* lies")
    assert not confirm(reused, settings, store)
    prefetch(URI, settings, store)
    with store.open_blob(blob_of(truth, "model-1.safetensors")) as stored:
        assert stored.map()[:] == TUNED["model-1.safetensors"]


def test_nothing_to_reuse(
    settings: Settings,
    store_settings: SettingsFactory,
    store: Store,
    s3: S3Server,
    proxy: FaultProxy,
    tmp_path: Path,
) -> None:
    """No manifest, no origin, an empty store, other chunks: all is left to the fetch."""
    assert reuse_model("s3://models/nothing-here", settings, store).bytes == 0
    assert reuse_model(BASE_URI, settings, store).bytes == 0
    assert reuse_model(str(tmp_path), settings, store).bytes == 0
    with Store.open(store_settings(store=tmp_path / "empty")) as empty:
        before = len(proxy.exchanges())
        assert reuse_model(URI, settings, empty).bytes == 0
        assert len(proxy.exchanges()) == before
    other = store_settings(chunk_size=2 * MIB)
    publish(URI, other)
    assert reuse_model(URI, settings, store).bytes == 0
    assert confirm(Reused(URI), settings, store)


def test_manifest_that_is_not_signed_as_configured(
    store_settings: SettingsFactory, store: Store, keys: Keys, expect_log: LogWatch
) -> None:
    settings = store_settings(manifest_key_file=str(keys.public))
    expect_log("is not signed")
    assert reuse_model(URI, settings, store).bytes == 0
    publish(URI, settings, key=keys.private)
    assert reuse_model(URI, settings, store).bytes == SAME


def test_spoilt_manifest_does_not_stop_a_prefetch(
    settings: Settings, store: Store, s3: S3Server, expect_log: LogWatch
) -> None:
    s3.put("models/tuned/.weightstream/manifest.json", b"{")
    expect_log("not a manifest")
    assert reuse_model(URI, settings, store).bytes == 0


def test_one_file_of_a_published_model(settings: Settings, store: Store) -> None:
    reused = reuse_model(f"{URI}/model-2.safetensors", settings, store)
    assert reused.bytes == 3 * MIB


def test_full_store_reuses_nothing_that_does_not_fit(
    store_settings: SettingsFactory, store: Store
) -> None:
    store.pin(BASE_URI)
    settings = store_settings(store_max_bytes=sum(map(len, BASE.values())) + MIB)
    with Store.open(settings) as full:
        assert reuse_model(URI, settings, full).bytes == 0
