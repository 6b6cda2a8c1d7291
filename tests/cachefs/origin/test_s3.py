"""Against a real S3 server with authentication."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.cachefs.origin.servers import Notes
from tests.kit.s3 import S3Server, storage_options

from weightstream.cachefs.origin import Origin, open_origin
from weightstream.errors import (
    AccessDeniedError,
    CredentialsError,
    NotFoundError,
    ObjectChangedError,
    UnavailableError,
    UsageError,
    WeightstreamError,
)
from weightstream.settings import Settings

FILES = {
    "a.safetensors": bytes(range(256)) * 5000,
    "config.json": b"{}",
    "empty": b"",
    ".hidden": b"h",
    "sub/sp ace+ü%41.txt": b"odd name",
}


@pytest.fixture(scope="module")
def filled(s3: S3Server) -> S3Server:
    s3.put_files("models/origin", FILES)
    return s3


@pytest.fixture
def origin(filled: S3Server, settings: Settings) -> Iterator[Origin]:
    origin = open_origin("s3://models/origin/", settings, storage_options(filled.url))
    yield origin
    origin.close()


def test_listing(origin: Origin, filled: S3Server) -> None:
    listing = origin.list(origin.uri)
    assert origin.uri == "s3://models/origin"
    assert [blob.uri for blob in listing] == sorted(f"s3://models/origin/{name}" for name in FILES)
    assert {blob.uri.partition("origin/")[2]: blob.size for blob in listing} == {
        name: len(data) for name, data in FILES.items()
    }
    assert all(blob.version and '"' not in blob.version for blob in listing)
    assert origin.host == filled.url.removeprefix("http://")


def test_one_object_is_a_listing_too(origin: Origin) -> None:
    (blob,) = origin.list("s3://models/origin/a.safetensors")
    assert (blob.uri, blob.size) == ("s3://models/origin/a.safetensors", 1_280_000)


def test_every_byte_of_every_file(origin: Origin) -> None:
    for blob in origin.list(origin.uri):
        data = FILES[blob.uri.removeprefix("s3://models/origin/")]
        into, notes = bytearray(blob.size), Notes()
        origin.read_into(blob, 0, memoryview(into), notes)
        assert into == data
        assert sum(notes.advanced) == len(data)


def test_ranges(origin: Origin) -> None:
    (blob,) = origin.list("s3://models/origin/a.safetensors")
    data = FILES["a.safetensors"]
    for start, stop in ((0, 1), (255, 70_000), (len(data) - 1, len(data))):
        into = bytearray(stop - start)
        origin.read_into(blob, start, memoryview(into), Notes())
        assert into == data[start:stop]


def test_a_listing_is_always_fresh(origin: Origin, filled: S3Server) -> None:
    before = origin.list("s3://models/origin/config.json")
    try:
        filled.put("models/origin/config.json", b'{"changed": true}')
        after = origin.list("s3://models/origin/config.json")
        assert after[0].size == 17
        assert after[0].version != before[0].version
        with pytest.raises(ObjectChangedError):
            origin.read_into(before[0], 0, memoryview(bytearray(2)), Notes())
    finally:
        filled.put("models/origin/config.json", FILES["config.json"])


@pytest.mark.parametrize("uri", ["s3://models/nothing-here", "s3://models/origin/nope.bin"])
def test_missing_keys(origin: Origin, uri: str) -> None:
    with pytest.raises(NotFoundError, match=uri):
        origin.list(uri)


def test_missing_bucket(origin: Origin) -> None:
    with pytest.raises(NotFoundError, match="NoSuchBucket"):
        origin.list("s3://no-such-bucket/x")


def test_missing_key_while_reading(origin: Origin) -> None:
    (blob,) = origin.list("s3://models/origin/config.json")
    gone = replace(blob, uri="s3://models/origin/gone")
    with pytest.raises(NotFoundError, match=r"s3://models/origin/gone: bytes 0-1: 127.*NoSuchKey"):
        origin.read_into(gone, 0, memoryview(bytearray(2)), Notes())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"secret": "wrong-secret"}, AccessDeniedError, "SignatureDoesNotMatch"),
        ({"key": "wrong-key"}, AccessDeniedError, "InvalidAccessKeyId"),
        ({"key": None, "secret": None}, CredentialsError, "credentials"),
        ({"endpoint_url": "http://127.0.0.1:1"}, UnavailableError, "connection refused"),
        ({"endpoint_url": "http://nowhere.invalid"}, UnavailableError, "cannot be resolved"),
        ({"endpoint_url": "nonsense"}, WeightstreamError, "nonsense"),
        ({"no_such_option": 1}, WeightstreamError, "no_such_option"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    filled: S3Server,
    settings: Settings,
    change: dict[str, object],
    error: type[WeightstreamError],
    words: str,
) -> None:
    options = storage_options(filled.url) | change
    with pytest.raises(error, match=words) as caught:
        open_origin("s3://models/origin", settings, options).list("s3://models/origin")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("s3://models/origin: ")
    assert "wrong-secret" not in str(caught.value)


def test_wrong_secret_on_the_data_plane(filled: S3Server, settings: Settings) -> None:
    good = open_origin("s3://models/origin", settings, storage_options(filled.url))
    (blob,) = good.list("s3://models/origin/config.json")
    bad = open_origin(good.uri, settings, storage_options(filled.url) | {"secret": "wrong-secret"})
    with pytest.raises(AccessDeniedError, match="SignatureDoesNotMatch") as caught:
        bad.read_into(blob, 0, memoryview(bytearray(2)), Notes())
    assert "wrong-secret" not in str(caught.value)


def test_credentials_and_endpoint_from_the_environment(
    filled: S3Server, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in filled.env.items():
        monkeypatch.setenv(name, value)
    origin = open_origin("s3://models/origin", settings)
    assert len(origin.list(origin.uri)) == len(FILES)


def test_reading_without_listing_first(filled: S3Server, settings: Settings) -> None:
    options = storage_options(filled.url)
    blob = open_origin("s3://models", settings, options).list("s3://models/origin/config.json")[0]
    into = bytearray(2)
    open_origin("s3://models", settings, options).read_into(blob, 0, memoryview(into), Notes())
    assert into == b"{}"


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "", "nowhere://x/y"])
def test_bad_uris(settings: Settings, uri: str) -> None:
    with pytest.raises(UsageError):
        open_origin(uri, settings).list(uri)


def test_no_checksum_where_the_server_has_none(origin: Origin) -> None:
    (blob,) = origin.list("s3://models/origin/config.json")
    assert origin.checksum(blob) is None


def test_opening_an_origin_imports_no_sdk() -> None:
    import subprocess

    code = (
        "import sys; from weightstream.cachefs.origin import open_origin;"
        "from weightstream.settings import Settings; o = open_origin('s3://b/x', Settings());"
        "slow = {'s3fs', 'fsspec', 'botocore', 'aiohttp'} & set(sys.modules);"
        "print(sorted(slow))"
    )
    path = next(p for p in sys.path if p.endswith("src"))
    command, env = [sys.executable, "-c", code], {"PYTHONPATH": path}
    found = subprocess.run(command, check=True, env=env, timeout=30, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
