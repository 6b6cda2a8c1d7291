"""The Hub and Google Cloud Storage: their own client libraries against small servers of ours."""

import hashlib
import json
import socket
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import pytest
from tests.cachefs.origin.servers import Handler, Notes, RawServer, answer, header, partial

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import Checksum, Origin, open_origin
from weightstream.errors import AccessDeniedError, NotFoundError, ObjectChangedError
from weightstream.settings import Settings

Start = Callable[[Handler], RawServer]
DATA = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(DATA).hexdigest()
COMMIT = "c" * 40
BLOB_ID = "b" * 40


def content(origin: Origin, blob: Blob, start: int = 0) -> bytes:
    into = bytearray(blob.size - start)
    origin.read_into(blob, start, memoryview(into), Notes())
    return bytes(into)


def as_json(value: object) -> bytes:
    return answer("200 OK", json.dumps(value).encode(), Content_Type="application/json")


class Hub:
    """The few routes of the Hub that listing and reading one repository take."""

    def __init__(self, cdn: RawServer) -> None:
        self.cdn = cdn
        self.sha256 = SHA256
        self.signature = "first"

    def __call__(self, head: str, sock: socket.socket) -> bool:
        method, target, _ = head.split(" ", 2)
        path = target.partition("?")[0]
        if header(head, "Authorization") != "Bearer hf_hunter2":
            sock.sendall(answer("401 Unauthorized"))
        elif path.endswith("/tree/main/sub"):
            item = {"type": "file", "path": "sub/x", "size": 1, "oid": BLOB_ID}
            sock.sendall(as_json([item]))
        elif path.endswith("/tree/main"):
            folder = {"type": "directory", "path": "sub", "size": 0, "oid": BLOB_ID}
            sock.sendall(as_json(self.tree() + [folder] * ("recursive=true" not in target.lower())))
        elif "/tree/main/" in path:
            sock.sendall(answer("404 Not Found", X_Error_Code="EntryNotFound"))
        elif path.startswith("/api/models/me/model"):
            sock.sendall(as_json({"id": "me/model", "sha": COMMIT, "siblings": []}))
        elif path.endswith("/model.safetensors"):
            location = f"{self.cdn.url}/blob?sig={self.signature}"
            lines = [f"Location: {location}", f'X-Linked-ETag: "{self.sha256}"']
            sock.sendall(
                "\r\n".join(["HTTP/1.1 302 Found", *lines, "Content-Length: 0\r\n\r\n"]).encode()
            )
        elif path.endswith("/config.json"):
            reply = answer("200 OK", b"{}", ETag=f'"{BLOB_ID}"')
            sock.sendall(
                reply[:-2] if method == "HEAD" else partial(b"{}", head, ETag=f'"{BLOB_ID}"')
            )
        else:
            sock.sendall(answer("404 Not Found", X_Error_Code="RepoNotFound"))
        return True

    def tree(self) -> list[dict[str, object]]:
        lfs = {"oid": self.sha256, "size": len(DATA), "pointerSize": 1}
        return [
            {"type": "file", "path": "config.json", "size": 2, "oid": BLOB_ID},
            {
                "type": "file",
                "path": "model.safetensors",
                "size": len(DATA),
                "oid": "d" * 40,
                "lfs": lfs,
            },
        ]


@pytest.fixture
def hub(raw_server: Start) -> tuple[Hub, RawServer]:
    pytest.importorskip("huggingface_hub")

    def cdn(head: str, sock: socket.socket) -> bool:
        good = f"sig={made.signature} " in head
        sock.sendall(partial(DATA, head, ETag='"cdn"') if good else answer("403 Forbidden"))
        return True

    made = Hub(raw_server(cdn))
    return made, raw_server(made)


def open_hub(server: RawServer, settings: Settings) -> Origin:
    options = {"endpoint": server.url, "token": "hf_hunter2"}
    return open_origin("hf://me/model", settings, options)


def test_hub_listing_and_reading(hub: tuple[Hub, RawServer], settings: Settings) -> None:
    made, server = hub
    origin = open_hub(server, settings)
    config, model = origin.list(origin.uri)
    assert (config.uri, config.version) == ("hf://me/model/config.json", BLOB_ID)
    assert (model.size, model.version) == (len(DATA), SHA256)
    assert content(origin, model) == DATA
    assert content(origin, model, 5) == DATA[5:]
    assert content(origin, config) == b"{}"
    assert all("hunter2" not in head for head in made.cdn.heads)
    resolved = [h for h in server.heads if "/resolve/" in h and "model.safetensors" in h]
    assert len(resolved) == 1  # the CDN's URL served both ranges


def test_hub_folders(hub: tuple[Hub, RawServer], settings: Settings) -> None:
    made, server = hub
    origin = open_hub(server, settings)
    found = origin.list_folder(origin.uri)
    assert found.folders == ("sub",)
    assert [listed.blob for listed in found.files] == list(origin.list(origin.uri))
    below = origin.list_folder(f"{origin.uri}/sub")
    assert [listed.blob for listed in below.files] == [Blob("hf://me/model/sub/x", 1, BLOB_ID)]
    for name in ("nope", "config.json"):
        with pytest.raises(NotFoundError, match=name):
            origin.list_folder(f"{origin.uri}/{name}")
    made.sha256 = "e" * 64
    assert origin.list_folder(origin.uri).files[1].blob.version == "e" * 64  # asked for anew


def test_hub_renews_a_signed_url(hub: tuple[Hub, RawServer], settings: Settings) -> None:
    made, server = hub
    origin = open_hub(server, settings)
    _, model = origin.list(origin.uri)
    assert content(origin, model) == DATA
    made.signature = "second"
    assert content(origin, model) == DATA


def test_hub_finds_a_moved_revision_out(hub: tuple[Hub, RawServer], settings: Settings) -> None:
    made, server = hub
    origin = open_hub(server, settings)
    _, model = origin.list(origin.uri)
    made.sha256 = "e" * 64
    with pytest.raises(ObjectChangedError, match="another version"):
        content(origin, model)


def test_hub_refusals(hub: tuple[Hub, RawServer], settings: Settings) -> None:
    _, server = hub
    with pytest.raises(NotFoundError) as caught:
        open_hub(server, settings).list("hf://me/other")
    assert "\n" not in str(caught.value)


class Gcs:
    """The JSON API's listing and media routes."""

    def __init__(self) -> None:
        self.generation = "7"

    def __call__(self, head: str, sock: socket.socket) -> bool:
        target = head.split(" ", 2)[1]
        item = {
            "kind": "storage#object",
            "name": "dir/a b.bin",
            "bucket": "bucket",
            "size": str(len(DATA)),
            "generation": self.generation,
            "crc32c": "AAAAAg==",
            "updated": "2026-03-04T05:06:07.089Z",
        }
        if target.startswith("/download/storage/v1/b/bucket/o/dir%2Fa%20b.bin?alt=media"):
            good = target.endswith(f"&generation={self.generation}")
            sock.sendall(partial(DATA, head) if good else answer("404 Not Found"))
        elif target.startswith("/storage/v1/b/bucket/o/dir%2Fa%20b.bin"):
            sock.sendall(as_json(item))
        elif target.startswith(("/storage/v1/b/bucket/o/?", "/storage/v1/b/bucket/o?")):
            sock.sendall(as_json({"kind": "storage#objects"} | self.page(target, item)))
        else:
            sock.sendall(answer("404 Not Found", b"{}"))
        return True

    def page(self, target: str, item: dict[str, str]) -> dict[str, object]:
        """Return one of the two pages of a folder, or the whole bucket."""
        query = {name: values[0] for name, values in parse_qs(urlsplit(target).query).items()}
        if "delimiter" not in query:
            return {"items": [item]}
        if query.get("prefix") != "dir/":
            return {} if "prefix" in query else {"prefixes": ["dir/", "/", "../"]}
        if "pageToken" not in query:
            return {"prefixes": ["dir/sub/", "dir//"], "nextPageToken": "more"}
        return {"items": [{**item, "name": "dir/", "size": "0"}, item]}


def test_gcs_folders(raw_server: Start, settings: Settings) -> None:
    pytest.importorskip("gcsfs")
    server = raw_server(Gcs())
    options = {"token": "anon", "endpoint_url": server.url}
    origin = open_origin("gs://bucket/dir", settings, options)
    assert origin.list_folder("gs://bucket").folders == ("", "..", "dir")
    found = origin.list_folder(origin.uri)
    assert found.folders == ("", "sub")
    (listed,) = found.files
    assert listed.blob == Blob("gs://bucket/dir/a b.bin", len(DATA), "7")
    assert listed.modified_ns == 1_772_600_767_089_000_000
    with pytest.raises(NotFoundError, match="gs://bucket/nope: "):
        origin.list_folder("gs://bucket/nope")
    with pytest.raises(NotFoundError):
        origin.list_folder("gs://no-such-bucket")


def test_gcs(raw_server: Start, settings: Settings) -> None:
    pytest.importorskip("gcsfs")
    made = Gcs()
    server = raw_server(made)
    options = {"token": "anon", "endpoint_url": server.url}
    origin = open_origin("gs://bucket/dir", settings, options)
    (blob,) = origin.list(origin.uri)
    assert blob == Blob("gs://bucket/dir/a b.bin", len(DATA), "7")
    assert content(origin, blob, 3) == DATA[3:]
    assert origin.checksum(blob) == Checksum("crc32c", 2)
    made.generation = "8"
    with pytest.raises(ObjectChangedError, match="generation 7"):
        content(origin, blob)
    assert origin.checksum(blob) is None


def test_hub_without_a_token(hub: tuple[Hub, RawServer], settings: Settings) -> None:
    _, server = hub
    options = {"endpoint": server.url, "token": False}
    with pytest.raises((AccessDeniedError, NotFoundError)):
        open_origin("hf://me/model", settings, options).list("hf://me/model")
