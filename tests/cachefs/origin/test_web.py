"""HTTP against nginx: files, folders, versions, redirects."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cachefs.origin.conftest import WebServer
from tests.cachefs.origin.servers import Handler, Notes, RawServer, header, partial

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.errors import (
    AccessDeniedError,
    NotFoundError,
    ObjectChangedError,
    OriginError,
    ProtocolError,
    UnavailableError,
)
from weightstream.settings import Settings

DATA = bytes(range(256)) * 3000
SHARDS = ("model-1-of-2.safetensors", "part two/model-2-of-2.safetensors")


@pytest.fixture(scope="module", autouse=True)
def files(web_server: WebServer) -> None:
    put(web_server, "plain/model.safetensors", DATA)
    put(web_server, "plain/config.json", b"{}")
    put(web_server, "plain/unrelated.bin", b"x")
    for number, shard in enumerate(SHARDS):
        put(web_server, f"sharded/{shard}", DATA[number:])
    index = {"weight_map": {f"t{i}": shard for i, shard in enumerate((*SHARDS, *SHARDS))}}
    put(web_server, "sharded/model.safetensors.index.json", json.dumps(index).encode())
    put(web_server, "listed/a.bin", b"a")
    put(web_server, "listed/b.bin", b"bb")
    put(web_server, "private/model.safetensors", DATA)
    put(web_server, "nothing/readme.txt", b"x")
    put(web_server, "hostile/model.safetensors.index.json", b'{"weight_map": {"t": "../../x"}}')


def put(server: WebServer, name: str, data: bytes) -> Path:
    path = server.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def listed(server: WebServer, settings: Settings, path: str) -> list[str]:
    origin = open_origin(f"{server.url}/{path}", settings)
    names = [blob.uri.removeprefix(f"{server.url}/") for blob in origin.list(origin.uri)]
    origin.close()
    return names


def content(origin: Origin, blob: Blob) -> bytes:
    into = bytearray(blob.size)
    origin.read_into(blob, 0, memoryview(into), Notes())
    return bytes(into)


def test_one_file(web_server: WebServer, settings: Settings) -> None:
    origin = open_origin(f"{web_server.url}/plain/model.safetensors", settings)
    (blob,) = origin.list(origin.uri)
    assert blob.uri == f"{web_server.url}/plain/model.safetensors"
    assert blob.size == len(DATA)
    assert blob.version
    assert content(origin, blob) == DATA


@pytest.mark.parametrize("path", ["plain", "plain/"])
def test_folder_with_one_model(web_server: WebServer, settings: Settings, path: str) -> None:
    assert listed(web_server, settings, path) == ["plain/config.json", "plain/model.safetensors"]


def test_folder_with_shards(web_server: WebServer, settings: Settings) -> None:
    origin = open_origin(f"{web_server.url}/sharded", settings)
    blobs = {blob.uri.partition("/sharded/")[2]: blob for blob in origin.list(origin.uri)}
    assert set(blobs) == {
        "model.safetensors.index.json",
        "model-1-of-2.safetensors",
        "part%20two/model-2-of-2.safetensors",
    }
    assert content(origin, blobs["part%20two/model-2-of-2.safetensors"]) == DATA[1:]


def test_folder_with_an_index_page(web_server: WebServer, settings: Settings) -> None:
    assert listed(web_server, settings, "listed/") == ["listed/a.bin", "listed/b.bin"]


def test_folders_of_a_model(web_server: WebServer, settings: Settings) -> None:
    origin = open_origin(f"{web_server.url}/sharded", settings)
    found = origin.list_folder(origin.uri)
    assert found.folders == ("part two",)
    assert [listed.blob.name for listed in found.files] == [
        "model-1-of-2.safetensors",
        "model.safetensors.index.json",
    ]
    assert all(listed.modified_ns for listed in found.files)
    (listed,) = origin.list_folder(f"{origin.uri}/part%20two").files
    assert listed.blob.uri == f"{web_server.url}/sharded/part%20two/model-2-of-2.safetensors"
    with pytest.raises(NotFoundError, match="no file is known there"):
        origin.list_folder(f"{origin.uri}/none")
    origin = open_origin(f"{web_server.url}/nothing", settings)
    with pytest.raises(NotFoundError, match="neither a file nor a folder"):
        origin.list_folder(origin.uri)


def test_folders_of_index_pages(web_server: WebServer, settings: Settings) -> None:
    put(web_server, "listed/deeper/c.bin", b"ccc")
    try:
        origin = open_origin(f"{web_server.url}/listed", settings)
        found = origin.list_folder(origin.uri)
        assert (found.folders, [f.blob.name for f in found.files]) == (
            ("deeper",),
            ["a.bin", "b.bin"],
        )
        (listed,) = origin.list_folder(f"{origin.uri}/deeper").files
        assert (listed.blob.name, listed.blob.size) == ("c.bin", 3)
    finally:
        (web_server.folder / "listed/deeper/c.bin").unlink()
        (web_server.folder / "listed/deeper").rmdir()


def test_an_index_that_points_outside_is_not_followed(
    web_server: WebServer, settings: Settings
) -> None:
    assert listed(web_server, settings, "hostile") == ["hostile/model.safetensors.index.json"]


def test_a_folder_without_a_model(web_server: WebServer, settings: Settings) -> None:
    with pytest.raises(NotFoundError, match=r"neither a file nor a folder with model\.safetensors"):
        listed(web_server, settings, "nothing/")
    with pytest.raises(NotFoundError):
        listed(web_server, settings, "no/such/file.safetensors")


def test_user_and_password(web_server: WebServer, settings: Settings) -> None:
    with pytest.raises(AccessDeniedError, match="401"):
        listed(web_server, settings, "private/model.safetensors")
    url = web_server.url.replace("http://", "http://user:pass@")
    origin = open_origin(f"{url}/private/model.safetensors", settings)
    (blob,) = origin.list(origin.uri)
    assert "pass" not in blob.uri
    assert content(origin, blob) == DATA


def test_headers_from_storage_options(web_server: WebServer, settings: Settings) -> None:
    options = {"headers": {"Authorization": "Basic dXNlcjpwYXNz"}}
    origin = open_origin(f"{web_server.url}/private", settings, options)
    (blob,) = origin.list(origin.uri)
    assert content(origin, blob) == DATA


def test_credentials_are_not_sent_to_another_host(
    web_server: WebServer, settings: Settings
) -> None:
    url = web_server.url.replace("http://", "http://user:pass@")
    with pytest.raises(AccessDeniedError, match="401"):
        open_origin(f"{url}/elsewhere", settings).list(f"{web_server.url}/elsewhere")


def test_redirects_are_followed_but_not_for_ever(web_server: WebServer, settings: Settings) -> None:
    origin = open_origin(f"{web_server.url}/moved/x", settings)
    with pytest.raises(NotFoundError):
        origin.list(origin.uri)
    with pytest.raises(ProtocolError, match="redirects"):
        listed(web_server, settings, "round")


def test_a_replaced_file_is_found_out(web_server: WebServer, settings: Settings) -> None:
    put(web_server, "plain/changing.bin", b"old" * 1000)
    origin = open_origin(f"{web_server.url}/plain/changing.bin", settings)
    (blob,) = origin.list(origin.uri)
    put(web_server, "plain/changing.bin", b"new!" * 1000)
    with pytest.raises(ObjectChangedError, match="412"):
        content(origin, blob)


def test_a_server_without_head_or_etag(
    raw_server: Callable[[Handler], RawServer], settings: Settings
) -> None:
    date = "Sun, 06 Nov 1994 08:49:37 GMT"

    def serve(head: str, sock: socket.socket) -> bool:
        if head.startswith("HEAD"):
            sock.sendall(b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n")
        else:
            sock.sendall(partial(DATA, head, Last_Modified=date))
        return True

    server = raw_server(serve)
    origin = open_origin(f"{server.url}/f.bin", settings)
    (blob,) = origin.list(origin.uri)
    assert (blob.size, blob.version) == (len(DATA), date)
    assert content(origin, blob) == DATA
    assert header(server.heads[-1], "If-Unmodified-Since") == date
    assert header(server.heads[-1], "If-Match") == ""


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", UnavailableError),
        (b"HTTP/1.1 418 Tea\r\nContent-Length: 0\r\n\r\n", OriginError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ProtocolError),
    ],
)
def test_listing_errors(
    raw_server: Callable[[Handler], RawServer],
    settings: Settings,
    reply: bytes,
    error: type[OriginError],
) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        sock.sendall(reply)
        return False

    server = raw_server(serve)
    with pytest.raises(error):
        open_origin(f"{server.url}/f.bin", settings).list(f"{server.url}/f.bin")
