"""Verifying names every file and every chunk that is not as published, and nothing else."""

import json
import shutil
from base64 import b64encode
from pathlib import Path

import pytest
from tests.conftest import LogWatch, SettingsFactory
from tests.kit.faults import Corrupt, When
from tests.kit.models import sharded
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server
from tests.p2p.manifest.conftest import Keys, WebServer, make_keys, publish_once

from weightstream.cachefs.fetch import Progress
from weightstream.cachefs.prefetch import prefetch
from weightstream.cachefs.store import Store
from weightstream.errors import FormatError, IntegrityError, NotFoundError, UsageError
from weightstream.p2p.manifest import WrongChunk, publish, verify
from weightstream.settings import Settings

MIB = 1 << 20
FILES = {**sharded(2, 5 * MIB, seed="verify"), "sub/empty.txt": b""}
SIZE = sum(map(len, FILES.values()))
SHARD = "model-00001-of-00002.safetensors"
URI = "s3://models/verify"


@pytest.fixture(autouse=True)
def model(s3: S3Server, s3_env: dict[str, str], settings: Settings) -> Path:
    """Publish the model."""
    folder = s3.root / "models/verify"
    shutil.rmtree(folder, ignore_errors=True)
    s3.put_files("models/verify", FILES)
    publish_once(s3, URI, settings)
    return folder


def flipped(data: bytes, *places: int) -> bytes:
    """Return the data with a bit of these bytes flipped."""
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 1
    return bytes(changed)


def test_model_as_published(settings: Settings, store_settings: SettingsFactory) -> None:
    report = verify(URI, settings)
    assert report.ok
    assert (report.files, report.bytes_checked, report.bytes_absent) == (len(FILES), SIZE, 0)
    assert report.missing == report.extra == report.resized == report.restamped == ()
    assert verify(URI, store_settings(chunk_size=2 * MIB)).ok  # the manifest's chunks count


def test_every_wrong_chunk_is_named(settings: Settings, s3: S3Server) -> None:
    data = FILES[SHARD]
    s3.put(f"models/verify/{SHARD}", flipped(data, 0, 5, MIB - 1, 2 * MIB, len(data) - 1))
    report = verify(URI, settings)
    assert not report.ok
    assert report.wrong == (
        WrongChunk(SHARD, 0, 0, MIB),
        WrongChunk(SHARD, 2, 2 * MIB, len(data)),
    )
    assert report.restamped == (SHARD,)
    assert report.bytes_checked == SIZE


def test_what_the_listing_tells(settings: Settings, s3: S3Server) -> None:
    s3.put("models/verify/new.json", b"{}")
    s3.put("models/verify/config.json", b"{} ")
    s3.delete(f"models/verify/{SHARD}")
    report = verify(URI, settings)
    assert not report.ok
    assert report.extra == ("new.json",)
    assert report.resized == ("config.json",)
    assert report.missing == (SHARD,)
    assert not report.wrong


def test_same_bytes_in_another_version(settings: Settings, tmp_path: Path) -> None:
    """A copy elsewhere is as published, but its versions are others."""
    for name, data in FILES.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    manifest = f"{URI}/.weightstream/manifest.json"
    report = verify(str(tmp_path / "copy"), settings, manifest)
    assert report.ok
    assert report.restamped == tuple(sorted(FILES))
    (tmp_path / "copy" / SHARD).write_bytes(flipped(FILES[SHARD], MIB))
    report = verify(str(tmp_path / "copy"), settings, manifest)
    assert [(bad.path, bad.chunk) for bad in report.wrong] == [(SHARD, 1)]


def test_damage_on_the_way_is_told_by_chunk(settings: Settings, proxy: FaultProxy) -> None:
    """Whether or not the origin has a checksum of its own."""
    from awscrt import checksums

    for _ in range(2):
        proxy.add(When(key=SHARD, covers=MIB + 7, ranged=True), Corrupt(at=MIB + 7))
        report = verify(URI, settings)
        assert [(bad.path, bad.chunk) for bad in report.wrong] == [(SHARD, 1)]
        assert not report.restamped
        crc = b64encode(checksums.crc64nvme(FILES[SHARD]).to_bytes(8, "big")).decode()
        proxy.checksums[f"/models/verify/{SHARD}"] = ("x-amz-checksum-crc64nvme", crc)


def test_http_origin_knows_files_by_the_manifest(settings: Settings, web: WebServer) -> None:
    """HTTP lists only what models usually have; what else was published is asked for by name."""
    files = {**sharded(1, MIB, seed="http"), "notes/read me.txt": b"hello"}
    web.files |= {f"/m/{name.replace(' ', '%20')}": data for name, data in files.items()}
    folder = settings.store.parent / "m"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    publish(str(folder), settings)
    for name in ("manifest.json", "model.torrent"):
        web.files[f"/m/.weightstream/{name}"] = (folder / ".weightstream" / name).read_bytes()
    report = verify(f"{web.url}/m", settings)
    assert report.ok
    assert report.bytes_checked == sum(map(len, files.values()))
    del web.files["/m/notes/read%20me.txt"]
    assert verify(f"{web.url}/m", settings).missing == ("notes/read me.txt",)


# ---- the store


def test_local_store(settings: Settings, proxy: FaultProxy) -> None:
    with Store.open(settings) as store:
        prefetch(f"{URI}/{SHARD}", settings, store)
    before = proxy.body_bytes()
    told: list[Progress] = []
    report = verify(URI, settings, local=True, progress=told.append)
    assert report.ok
    assert report.bytes_checked == len(FILES[SHARD])
    assert report.bytes_absent == SIZE - len(FILES[SHARD])
    assert told[-1].bytes_done == told[-1].bytes_total == len(FILES[SHARD])
    assert proxy.body_bytes() - before < 100_000  # the manifest alone


def test_local_store_by_chunks_of_another_size(
    settings: Settings, store_settings: SettingsFactory
) -> None:
    """The store's chunks need not be the manifest's."""
    with Store.open(store_settings(chunk_size=256 << 10)) as store:
        prefetch(URI, store_settings(chunk_size=256 << 10), store)
        [info] = [info for info in store.blobs() if info.blob.name == SHARD]
        with store.open_blob(info.blob) as stored:
            stored.drop(1)
    report = verify(URI, settings, local=True)
    assert report.ok
    assert report.bytes_absent == MIB
    assert report.bytes_checked == SIZE - MIB


def test_local_store_with_damage(settings: Settings, expect_log: LogWatch) -> None:
    expect_log("was changed by somebody")
    with Store.open(settings) as store:
        prefetch(URI, settings, store)
        [info] = [info for info in store.blobs() if info.blob.name == SHARD]
        with store.open_blob(info.blob) as stored:
            path = stored.data_path
    with path.open("r+b") as file:
        file.seek(MIB + 100)
        file.write(b"wrong")
    report = verify(URI, settings, local=True)
    assert not report.ok
    assert report.wrong == (WrongChunk(SHARD, 1, MIB, 2 * MIB),)
    assert verify(URI, settings).ok


def test_other_versions_in_the_store_do_not_count(settings: Settings, s3: S3Server) -> None:
    s3.put(f"models/verify/{SHARD}", flipped(FILES[SHARD], 7))
    with Store.open(settings) as store:
        prefetch(URI, settings, store)
    report = verify(URI, settings, local=True)
    assert report.ok
    assert report.bytes_absent == len(FILES[SHARD])


# ---- signatures and manifests


def test_signed_by_the_right_key(settings: Settings, keys: Keys, tmp_path: Path) -> None:
    publish(URI, settings, key=keys.private)
    report = verify(URI, settings, key=keys.public)
    assert report.ok
    assert report.signed_by == str(keys.public)
    other = make_keys(tmp_path, "other")
    with pytest.raises(IntegrityError, match="not signed with"):
        verify(URI, settings, key=other.public)
    with pytest.raises(UsageError, match="not an unencrypted public key"):
        verify(URI, settings, key=keys.private)


def test_unsigned_where_a_signature_is_wanted(settings: Settings, keys: Keys) -> None:
    with pytest.raises(IntegrityError, match="is not signed"):
        verify(URI, settings, key=keys.public)


def test_signature_of_another_manifest(settings: Settings, keys: Keys, model: Path) -> None:
    """Whoever may write to the bucket has yet no signature for what he writes there."""
    publish(URI, settings, key=keys.private)
    path = model / ".weightstream/manifest.json"
    signature = json.loads(path.read_bytes())["signature"]
    (model / SHARD).write_bytes(flipped(FILES[SHARD], 9))
    publish(str(model), settings)
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps({**document, "signature": signature}))
    assert verify(str(model), settings).ok
    with pytest.raises(IntegrityError, match="not signed with"):
        verify(str(model), settings, key=keys.public)


def test_manifest_that_is_none(settings: Settings, model: Path, s3: S3Server) -> None:
    s3.put("models/verify/.weightstream/manifest.json", b"{}")
    with pytest.raises(FormatError, match=r"manifest\.json: not a manifest"):
        verify(URI, settings)
    s3.put("models/verify/.weightstream/manifest.json", b"")
    with pytest.raises(FormatError, match="not a manifest"):
        verify(URI, settings)
    s3.delete("models/verify/.weightstream/manifest.json")
    with pytest.raises(NotFoundError, match=r"manifest\.json"):
        verify(URI, settings)


def test_manifest_that_is_huge_is_not_fetched(
    settings: Settings, model: Path, s3: S3Server, proxy: FaultProxy
) -> None:
    path = model / ".weightstream/manifest.json"
    with path.open("r+b") as file:
        file.truncate(100 << 20)
    s3.forget()
    before = proxy.body_bytes()
    with pytest.raises(FormatError, match="104857600 bytes"):
        verify(URI, settings)
    assert proxy.body_bytes() - before < 100_000


def test_changed_field_is_a_wrong_root_hash(settings: Settings, model: Path, s3: S3Server) -> None:
    path = model / ".weightstream/manifest.json"
    document = json.loads(path.read_bytes())
    document["files"][0]["version"] = "0" * 32
    s3.put("models/verify/.weightstream/manifest.json", json.dumps(document).encode())
    with pytest.raises(IntegrityError, match="root hash"):
        verify(URI, settings)
