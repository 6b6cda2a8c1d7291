"""Publishing reads a model once, and what it writes is true; or it writes nothing."""

import hashlib
import json
import os
import time
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from awscrt import checksums
from blake3 import blake3
from tests.conftest import SettingsFactory
from tests.kit.faults import Corrupt, Hook, When
from tests.kit.models import random_bytes, sharded
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server
from tests.p2p.manifest.conftest import Keys, WebServer

from weightstream.cachefs.fetch import Progress
from weightstream.cachefs.prefetch import prefetch
from weightstream.cachefs.store import Store
from weightstream.errors import (
    IntegrityError,
    NotFoundError,
    ObjectChangedError,
    UsageError,
)
from weightstream.p2p.manifest import Manifest, publish
from weightstream.p2p.manifest.parse import parse
from weightstream.p2p.manifest.signing import check_signature
from weightstream.p2p.manifest.webseed import seed_folder
from weightstream.settings import Settings

MIB = 1 << 20
FILES = {
    **sharded(2, 7 * MIB, seed="publish"),
    "empty.txt": b"",
    "sub/deep/small.bin": random_bytes(100_000, "small"),
}
SIZE = sum(map(len, FILES.values()))
URI = "s3://models/publish"


@pytest.fixture(autouse=True)
def model(s3: S3Server, s3_env: dict[str, str]) -> Path:
    """Put the model on the server, behind the proxy, with nothing published."""
    s3.put_files("models/publish", FILES)
    folder = s3.root / "models/publish"
    for path in folder.glob(".weightstream/*"):
        path.unlink()
    s3.forget()
    return folder


def published(model: Path) -> Manifest:
    """Return the manifest on the server."""
    return parse((model / ".weightstream/manifest.json").read_bytes(), URI)


def check_content(manifest: Manifest, files: dict[str, bytes]) -> None:
    """Check every claim of a manifest against the bytes."""
    assert [file.path for file in manifest.files] == sorted(files)
    for file in manifest.files:
        data = files[file.path]
        assert file.size == len(data)
        assert file.crc64nvme == checksums.crc64nvme(data)
        for i, extent in manifest.chunks(file):
            assert file.digest(i) == blake3(data[extent.start : extent.stop]).digest()


@pytest.mark.parametrize(
    ("chunk_size", "range_size"), [(64 << 10, MIB), (MIB, 4 * MIB), (3 * MIB, MIB)]
)
def test_published_manifest_is_true(
    store_settings: SettingsFactory, model: Path, chunk_size: int, range_size: int
) -> None:
    settings = store_settings(chunk_size=chunk_size, range_size=range_size)
    report = publish(URI, settings)
    manifest = published(model)
    check_content(manifest, FILES)
    assert manifest.chunk_size == chunk_size
    assert (report.files, report.bytes_total) == (len(FILES), SIZE)
    assert report.root == manifest.root.hex()
    assert report.manifest == f"{URI}/.weightstream/manifest.json"
    for file in manifest.files:
        assert file.version == hashlib.md5(FILES[file.path]).hexdigest()


@pytest.mark.parametrize("chunk_size", [64 << 10, 3 * MIB])
def test_libtorrent_finds_every_piece_of_the_torrent_on_disk(
    store_settings: SettingsFactory, model: Path, chunk_size: int
) -> None:
    lt = pytest.importorskip("libtorrent")
    publish(URI, store_settings(chunk_size=chunk_size))
    body = (model / ".weightstream/model.torrent").read_bytes()
    parameters = lt.load_torrent_buffer(body)
    parameters.save_path = str(model.parent)
    parameters.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    assert parameters.ti.name() == "publish"
    assert parameters.ti.priv()
    session = lt.session({"listen_interfaces": "", "enable_dht": False, "enable_lsd": False})
    handle = session.add_torrent(parameters)
    until = time.monotonic() + 30
    while not handle.status().is_seeding:
        assert time.monotonic() < until, handle.status().progress
        time.sleep(0.02)


def test_each_byte_is_read_once(settings: Settings, proxy: FaultProxy) -> None:
    publish(URI, settings)
    assert sum(e.body_bytes for e in proxy.exchanges() if e.range) == SIZE


def test_what_the_store_has_is_not_read_again(settings: Settings, proxy: FaultProxy) -> None:
    name = "model-00001-of-00002.safetensors"
    with Store.open(settings) as store:
        prefetch(f"{URI}/{name}", settings, store)
        proxy.clear()
        before = sum(e.body_bytes for e in proxy.exchanges() if e.range)
        report = publish(URI, settings, store=store)
        usage = store.usage_bytes()
        assert {info.blob.name for info in store.blobs()} == {name}  # and nothing was added
    after = sum(e.body_bytes for e in proxy.exchanges() if e.range)
    assert after - before == SIZE - len(FILES[name])
    assert report.bytes_by_source == {"store": len(FILES[name]), "origin": SIZE - len(FILES[name])}
    assert usage < 2 * len(FILES[name])


def test_store_with_chunks_of_another_size(
    store_settings: SettingsFactory, model: Path, proxy: FaultProxy
) -> None:
    settings = store_settings()
    with Store.open(settings) as store:
        prefetch(URI, settings, store)
        report = publish(URI, store_settings(chunk_size=2 * MIB), store=store)
    assert report.bytes_by_source == {"origin": SIZE}
    check_content(published(model), FILES)


def test_memory_smaller_than_a_file(store_settings: SettingsFactory, model: Path) -> None:
    publish(URI, store_settings(memory_budget=MIB))
    check_content(published(model), FILES)


def test_publishing_again_leaves_out_what_was_published(settings: Settings, model: Path) -> None:
    first = publish(URI, settings)
    again = publish(URI, settings)
    assert again.root == first.root
    check_content(published(model), FILES)


def test_elsewhere(settings: Settings, model: Path, tmp_path: Path, s3: S3Server) -> None:
    report = publish(URI, settings, to=str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "model.torrent"]
    assert report.manifest == str(tmp_path / "out/manifest.json")
    publish(URI, settings, to="s3://models/elsewhere/x/")
    body = (s3.root / "models/elsewhere/x/manifest.json").read_bytes()
    assert body == (tmp_path / "out/manifest.json").read_bytes()
    assert not list(model.glob(".weightstream/*"))


def test_local_directory(settings: Settings, tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(data)
    report = publish(str(tmp_path / "m"), settings)
    body = (tmp_path / "m/.weightstream/manifest.json").read_bytes()
    check_content(parse(body, str(tmp_path / "m")), FILES)
    assert publish(f"file://{tmp_path}/m", settings).root == report.root
    assert sorted(os.listdir(tmp_path / "m/.weightstream")) == ["manifest.json", "model.torrent"]


def test_signature(settings: Settings, model: Path, keys: Keys, tmp_path: Path) -> None:
    assert publish(URI, settings, key=keys.private).signed
    check_signature(published(model), keys.public, "x")
    text = json.loads((model / ".weightstream/manifest.json").read_bytes())
    assert len(text["signature"]) == 88
    for wrong in (keys.public, tmp_path / "none"):
        with pytest.raises(UsageError, match=str(wrong)):
            publish(URI, settings, key=wrong)


def test_progress_ends_at_the_total(settings: Settings) -> None:
    told: list[Progress] = []
    publish(URI, settings, progress=told.append)
    assert told[-1].bytes_done == told[-1].bytes_total == SIZE
    assert [p.bytes_done for p in told] == sorted(p.bytes_done for p in told)


@pytest.mark.parametrize("count", [1, 3])
def test_torrent_downloads_from_a_public_origin(
    settings: Settings, web: WebServer, tmp_path: Path, count: int
) -> None:
    """A model that anybody may read: BitTorrent clients get it from the web server itself."""
    lt = pytest.importorskip("libtorrent")
    several = {**sharded(2, 3 * MIB, seed="web"), "tokenizer.json": b"[]"}
    files = several if count > 1 else {"model.safetensors": random_bytes(2 * MIB + 9, "web")}
    web.files |= {f"/a/m del/{name}".replace(" ", "%20"): data for name, data in files.items()}
    report = publish(f"{web.url}/a/m%20del", settings, to=str(tmp_path / "out"))
    assert report.web_seed == f"{web.url}/a/{'' if count > 1 else 'm%20del/'}"
    parameters = lt.load_torrent_buffer((tmp_path / "out/model.torrent").read_bytes())
    assert not parameters.ti.priv()
    parameters.save_path = str(tmp_path / "down")
    parameters.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    session = lt.session(
        {
            "listen_interfaces": "",
            "enable_dht": False,
            "enable_lsd": False,
            "ssrf_mitigation": False,
        }
    )
    handle = session.add_torrent(parameters)
    until = time.monotonic() + 30
    folder = tmp_path / "down" / ("m del" if count > 1 else "")

    def there(name: str, data: bytes) -> bool:
        path = folder / name
        return path.exists() and path.read_bytes() == data

    # libtorrent calls itself a seed before the last bytes are in the file
    while not all(there(name, data) for name, data in files.items()):
        assert time.monotonic() < until, web.asked
        time.sleep(0.02)
    session.remove_torrent(handle)


def test_no_secret_gets_into_the_torrent(
    settings: Settings, web: WebServer, tmp_path: Path
) -> None:
    web.files["/m/model.safetensors?token=hush"] = random_bytes(1000, "x")
    with pytest.raises(UsageError, match="one file") as refused:
        publish(f"{web.url}/m/model.safetensors?token=hush", settings, to=str(tmp_path))
    report = publish(f"{web.url}/m?token=hush", settings, to=str(tmp_path / "out"))
    assert report.web_seed is None
    assert report.files == 1
    said = [repr(report), str(refused.value)]
    written = [file.read_bytes() for file in (tmp_path / "out").iterdir()]
    assert "hush" not in "".join(said)
    assert len(written) == 2
    assert b"hush" not in b"".join(written)


@pytest.mark.parametrize(
    ("url", "below", "folder"),
    [
        ("https://h/b/m/a.bin", "m/a.bin", "https://h/b/"),
        ("https://b.h/m/d/a%20b.bin", "m/d/a b.bin", "https://b.h/"),
        ("https://h/b/m/a%20b.bin", "a b.bin", "https://h/b/m/"),
        ("https://h/m/a.bin?v=1", "m/a.bin", None),
        ("https://m.h/a.bin", "m/a.bin", None),  # a whole bucket, by its own host name
        ("https://h/other/a.bin", "m/a.bin", None),
    ],
)
def test_folder_of_a_web_seed(url: str, below: str, folder: str | None) -> None:
    assert seed_folder(url, below) == folder


# ---- what is refused, and then nothing is written


def nothing_published(model: Path) -> bool:
    return not list(model.glob(".weightstream/*"))


def test_object_that_changes_while_it_is_read(
    settings: Settings, model: Path, proxy: FaultProxy, s3: S3Server
) -> None:
    """The store refuses the ranges of the old version by If-Match."""
    name = "model-00002-of-00002.safetensors"

    def replace(_: Any) -> None:
        s3.put(f"models/publish/{name}", FILES[name][::-1])

    proxy.add(When(ranged=True, key=name, times=1), Hook(replace))
    with pytest.raises(ObjectChangedError, match=name):
        publish(URI, settings)
    assert nothing_published(model)


@pytest.mark.parametrize("change", ["replaced", "added", "removed"])
def test_listing_that_changes_while_it_is_read(
    settings: Settings, model: Path, s3: S3Server, change: str
) -> None:
    """After a file was read its bytes are not asked for again: the listing tells."""
    done: list[str] = []

    def change_once(now: Progress) -> None:
        if now.bytes_done == now.bytes_total and not done:
            done.append(change)
            if change == "removed":
                s3.delete("models/publish/config.json")
            else:
                name = "config.json" if change == "replaced" else "new.json"
                s3.put(f"models/publish/{name}", b"[1]")

    try:
        with pytest.raises(ObjectChangedError, match=rf"\.json was {change} while"):
            publish(URI, settings, progress=change_once)
    finally:
        (model / "new.json").unlink(missing_ok=True)
    assert nothing_published(model)


def test_damage_on_the_way_is_not_published(
    settings: Settings, model: Path, proxy: FaultProxy
) -> None:
    """The origin's own checksum of the object is compared."""
    name = "model-00001-of-00002.safetensors"
    crc = checksums.crc64nvme(FILES[name]).to_bytes(8, "big")
    header = ("x-amz-checksum-crc64nvme", b64encode(crc).decode())
    proxy.checksums[f"/models/publish/{name}"] = header
    proxy.add(When(ranged=True, key=name, covers=5000), Corrupt(at=5000))
    with pytest.raises(IntegrityError, match=name):
        publish(URI, settings)
    assert nothing_published(model)


def test_origin_without_versions_is_refused(
    settings: Settings, web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/unversioned/model.safetensors", b"x" * 100)
    monkeypatch.setattr("weightstream.cachefs.origin.generic._VERSION_KEYS", ())
    with pytest.raises(UsageError, match="names no version"):
        publish("memory://unversioned", settings, to=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    fs.rm("/unversioned", recursive=True)


def test_model_with_too_many_chunks_is_refused_before_it_is_read(
    store_settings: SettingsFactory, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    with (tmp_path / "m/model.safetensors").open("wb") as file:
        file.truncate(64 << 30)
    with pytest.raises(UsageError, match="a larger chunk_size"):
        publish(str(tmp_path / "m"), store_settings(chunk_size=64 << 10))


def test_other_refusals(
    settings: Settings, web: WebServer, store_settings: SettingsFactory
) -> None:
    with pytest.raises(UsageError, match="one file"):
        publish(f"{URI}/config.json", settings)
    with pytest.raises(NotFoundError):
        publish("s3://models/nothing-here", settings)
    with pytest.raises(UsageError, match="--to"):
        publish(f"{web.url}/m", settings)
    with pytest.raises(UsageError, match="is in the model"):
        publish(URI, settings, to=f"{URI}/hashes")
    with pytest.raises(UsageError, match="16 KiB"):
        publish(URI, store_settings(chunk_size=68 << 10))


def test_memory_file_system(settings: Settings) -> None:
    """Any fsspec file system can be published to."""
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/gen/model.safetensors", FILES["sub/deep/small.bin"])
    publish("memory://gen", settings)
    body = fs.cat_file("/gen/.weightstream/manifest.json")
    check_content(parse(body, "memory://gen"), {"model.safetensors": FILES["sub/deep/small.bin"]})
    fs.rm("/gen", recursive=True)
