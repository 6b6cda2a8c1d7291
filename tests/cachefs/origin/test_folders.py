"""One folder at a time, from every kind of origin."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cachefs.origin.servers import Handler, RawServer
from tests.kit import faults as f
from tests.kit.bucket import Bucket, error, reply
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, storage_options

from weightstream.cachefs.origin import FolderListing, Origin, open_origin
from weightstream.cachefs.origin.responses import Asked
from weightstream.cachefs.origin.s3_listing import list_through_s3fs, parse_page
from weightstream.errors import (
    AccessDeniedError,
    CredentialsError,
    NotFoundError,
    ProtocolError,
    ThrottledError,
    UnavailableError,
)
from weightstream.settings import Settings

Start = Callable[[Handler], RawServer]


def names(listing: FolderListing) -> list[str]:
    return [listed.blob.name for listed in listing.files]


# Directories of this machine.


def test_a_directory(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "sub/deep").mkdir(parents=True)
    (tmp_path / "b.bin").write_bytes(b"bb")
    (tmp_path / "a.bin").write_bytes(b"a")
    os.utime(tmp_path / "a.bin", ns=(1, 1_234_567_890_123_456_789))
    (tmp_path / "link").symlink_to(tmp_path / "b.bin")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "sub/higher").symlink_to(tmp_path.parent)
    (tmp_path / "broken").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    origin = open_origin(tmp_path, settings)
    found = origin.list_folder(origin.uri)
    assert found.folders == ("linked", "sub")
    assert names(found) == ["a.bin", "b.bin", "link"]
    assert [listed.blob for listed in found.files] == list(
        blob for blob in origin.list(origin.uri) if f"{origin.uri}/{blob.name}" == blob.uri
    )
    assert found.files[0].modified_ns == 1_234_567_890_123_456_789
    for name in found.folders:  # the link upwards is left out: a walk would never end
        assert origin.list_folder(f"{origin.uri}/{name}").folders == ("deep",)
    assert origin.list_folder(f"{origin.uri}/sub/deep") == FolderListing((), ())


def test_no_directory(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "file").write_bytes(b"")
    origin = open_origin(tmp_path, settings)
    for name in ("none", "file", "file/below"):
        with pytest.raises(NotFoundError, match=name):
            origin.list_folder(f"{origin.uri}/{name}")


# Whatever fsspec knows.


def test_a_folder_of_fsspec(settings: Settings) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/folders/a.bin": b"a", "/folders/sub/b.bin": b"bb", "/folders/sub/c/d": b""})
    origin = open_origin("memory://folders", settings)
    found = origin.list_folder(origin.uri)
    assert (found.folders, names(found)) == (("sub",), ["a.bin"])
    assert found.files[0].blob == origin.list(origin.uri)[0]
    assert found.files[0].modified_ns is not None
    found = origin.list_folder("memory://folders/sub")
    assert (found.folders, names(found)) == (("c",), ["b.bin"])
    for name in ("none", "a.bin"):
        with pytest.raises(NotFoundError, match=name):
            origin.list_folder(f"memory://folders/{name}")
    memory.rm("/folders", recursive=True)


# A real S3 server.


@pytest.fixture(scope="module")
def filled(s3: S3Server) -> S3Server:
    files = {"a.bin": b"a", "sub/b+ ü%41.bin": b"bb", "sub/c/d.bin": b"ddd", ".hidden": b""}
    s3.put_files("models/folders", files)
    (s3.root / "empty-bucket").mkdir(exist_ok=True)
    return s3


@pytest.fixture
def origin(filled: S3Server, settings: Settings) -> Iterator[Origin]:
    origin = open_origin("s3://models/folders", settings, storage_options(filled.url))
    yield origin
    origin.close()


def test_a_prefix(origin: Origin) -> None:
    found = origin.list_folder(origin.uri)
    assert (found.folders, names(found)) == (("sub",), [".hidden", "a.bin"])
    assert origin.list_folder(f"{origin.uri}/") == found
    deeper = origin.list_folder(f"{origin.uri}/sub")
    assert (deeper.folders, names(deeper)) == (("c",), ["b+ ü%41.bin"])
    listed = {item.blob for item in (*found.files, *deeper.files)}
    assert listed == {blob for blob in origin.list(origin.uri) if "/c/" not in blob.uri}
    assert all(item.modified_ns for item in found.files)


def test_buckets(origin: Origin) -> None:
    assert "folders" in origin.list_folder("s3://models").folders
    assert origin.list_folder("s3://empty-bucket") == FolderListing((), ())
    with pytest.raises(NotFoundError, match=r"s3://no-such-bucket: .*NoSuchBucket"):
        origin.list_folder("s3://no-such-bucket")


@pytest.mark.parametrize("name", ["nope", "a.bin", "sub/nope", "su"])
def test_missing_prefixes(origin: Origin, name: str) -> None:
    with pytest.raises(NotFoundError, match=f"folders/{name}: .*no object is there"):
        origin.list_folder(f"{origin.uri}/{name}")


def test_a_prefix_through_s3fs(origin: Origin, filled: S3Server) -> None:
    """What the data plane does not speak: the same answer, by the other way."""
    fs = fsspec.filesystem("s3", **storage_options(filled.url), skip_instance_cache=True)
    for key in ("folders", "folders/sub"):
        asked = Asked(f"s3://models/{key}", "x")
        found = list_through_s3fs(fs, "models", key, asked, 20.0)
        assert found == origin.list_folder(asked.uri)
    with pytest.raises(NotFoundError):
        list_through_s3fs(fs, "models", "nope", Asked("s3://models/nope", "x"), 20.0)
    assert list_through_s3fs(fs, "empty-bucket", "", asked, 20.0) == FolderListing((), ())


@pytest.mark.parametrize(
    ("change", "failure", "words"),
    [
        ({"secret": "wrong-secret"}, AccessDeniedError, "SignatureDoesNotMatch"),
        ({"key": None, "secret": None}, CredentialsError, "credentials"),
        ({"endpoint_url": "http://127.0.0.1:1"}, UnavailableError, "connection refused"),
    ],
)
def test_refusals(
    filled: S3Server,
    settings: Settings,
    change: dict[str, object],
    failure: type[Exception],
    words: str,
) -> None:
    options = storage_options(filled.url) | change
    with pytest.raises(failure, match=f"^s3://models/folders: .*{words}") as caught:
        open_origin("s3://models", settings, options).list_folder("s3://models/folders")
    assert "\n" not in str(caught.value)
    assert "wrong-secret" not in str(caught.value)


def test_listings_are_tried_again(
    proxy: FaultProxy, filled: S3Server, s3_env: dict[str, str], settings: Settings
) -> None:
    origin = open_origin("s3://models/folders", settings)
    whole = origin.list_folder(origin.uri)
    for faults in (f.SLOW_DOWN, f.INTERNAL_ERROR, f.Drop(reset=True), f.ShortBody(100)):
        proxy.clear()
        proxy.add(f.When(times=2), faults)
        assert origin.list_folder(origin.uri) == whole
        assert len(proxy.exchanges()) >= 3
    proxy.add(f.ALWAYS, f.SLOW_DOWN)
    with pytest.raises(ThrottledError, match="SlowDown"):
        origin.list_folder(origin.uri)


def test_a_listing_has_a_deadline(
    proxy: FaultProxy, filled: S3Server, s3_env: dict[str, str], tmp_path: Path
) -> None:
    settings = Settings(store=tmp_path, deadline_s=0.4, stall_timeout_s=60.0)
    origin = open_origin("s3://models/folders", settings)
    origin.list_folder(origin.uri)
    proxy.add(f.ALWAYS, f.DripHead(20.0))
    with pytest.raises(UnavailableError, match="within the deadline"):
        origin.list_folder(origin.uri)
    proxy.clear()


def test_expired_credentials_are_renewed_once(
    proxy: FaultProxy, filled: S3Server, s3_env: dict[str, str], settings: Settings
) -> None:
    origin = open_origin("s3://models/folders", settings)
    proxy.add(f.When(), f.EXPIRED_TOKEN)
    assert names(origin.list_folder(origin.uri)) == [".hidden", "a.bin"]
    proxy.add(f.ALWAYS, f.EXPIRED_TOKEN)
    with pytest.raises(CredentialsError, match="ExpiredToken"):
        origin.list_folder(origin.uri)


# Keys that no file server can hold.


@pytest.fixture
def bucket(raw_server: Start, settings: Settings) -> tuple[Bucket, Origin]:
    made = Bucket()
    server = raw_server(made)
    options = storage_options(server.url)
    return made, open_origin("s3://models", settings, options)


def test_odd_keys(bucket: tuple[Bucket, Origin]) -> None:
    made, origin = bucket
    keys = [b"dir/", b"dir/a", b"e//f", b"/lead", b"x", b"x/y", b"..", b"../up", b"./here", b"\xff"]
    keys += [b"nul\0", b"new\nline", "ü +%2B".encode(), b"marker/", b"q?versionId=1/z", b"e/"]
    made.objects = {key: b"1" for key in keys}
    found = origin.list_folder("s3://models")
    folders = ("", ".", "..", "dir", "e", "marker", "q?versionId=1", "x")
    assert found.folders == folders
    assert names(found) == ["..", "new\nline", "nul\0", "x", "ü +%2B", "\udcff"]
    below = {name: origin.list_folder(f"s3://models/{name}") for name in folders if name}
    assert below["dir"].folders == ()
    assert names(below["dir"]) == ["a"]
    assert below["e"].folders == ("",)
    assert below["marker"] == FolderListing((), ())
    assert names(below["q?versionId=1"]) == ["z"]
    assert names(below["x"]) == ["y"]
    assert found.files[0].modified_ns == 1_772_600_767_089_000_000


def test_pages(bucket: tuple[Bucket, Origin]) -> None:
    made, origin = bucket
    made.objects = {f"many/{i:04}".encode(): b"" for i in range(2500)}
    made.objects |= {f"many/sub{i:04}/x".encode(): b"" for i in range(2500)}
    found = origin.list_folder("s3://models/many")
    assert names(found) == [f"{i:04}" for i in range(2500)]
    assert found.folders == tuple(f"sub{i:04}" for i in range(2500))
    assert len(made.requests) == 5


def test_names_that_are_not_escaped(bucket: tuple[Bucket, Origin]) -> None:
    made, origin = bucket
    made.escape_names = False
    made.objects = {b"a%20b+c": b"", b"<&>": b""}
    assert names(origin.list_folder("s3://models")) == ["<&>", "a%20b+c"]


@pytest.mark.parametrize(
    "body",
    [
        b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><ListBucketResult>&a;</ListBucketResult>",
        b"<html/>",
        b"",
        b"<ListBucketResult><Contents><Size>-x</Size></Contents></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
    ],
)
def test_answers_that_are_no_listing(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_page(body, "models", Asked("s3://models", "x"))


@given(st.binary(max_size=300) | st.text("<>/ListBucketResultContentsKeySize&;'\"").map(str.encode))
def test_any_answer_is_parsed_or_refused(body: bytes) -> None:
    with suppress(ProtocolError):
        parse_page(body, "models", Asked("s3://models", "x"))


def test_a_listing_in_circles(bucket: tuple[Bucket, Origin]) -> None:
    made, origin = bucket
    made.objects, made.page = {b"a": b"", b"b": b""}, 1
    first: list[bytes] = []

    def answer(query: dict[str, bytes], sock: socket.socket) -> bool:
        first.append(made.listing({"delimiter": b"/"}))
        sock.sendall(reply("200 OK", first[0]))
        return True

    made.before = answer
    with pytest.raises(ProtocolError, match="goes in circles"):
        origin.list_folder("s3://models")


def test_another_region_is_for_s3fs(bucket: tuple[Bucket, Origin]) -> None:
    """What is refused in a way of its own is asked again through s3fs, which knows more ways."""
    made, origin = bucket
    made.objects = {b"a": b""}

    def answer(query: dict[str, bytes], sock: socket.socket) -> bool:
        if len(made.requests) == 1:
            sock.sendall(error("400 Bad Request", "AuthorizationHeaderMalformed"))
        return len(made.requests) == 1

    made.before = answer
    assert names(origin.list_folder("s3://models")) == ["a"]
    assert len(made.requests) == 2
