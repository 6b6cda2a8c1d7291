"""A model on the S3 server, keys, and a web server that anybody may read from."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.conftest import SettingsFactory
from tests.kit.s3 import S3Server

from weightstream.p2p.manifest import publish
from weightstream.settings import Settings


@dataclass(frozen=True, slots=True)
class Keys:
    """A pair of PEM files."""

    private: Path
    public: Path


def make_keys(folder: Path, name: str = "key") -> Keys:
    """Write a new pair of keys."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pair = Keys(folder / f"{name}.pem", folder / f"{name}.pub")
    pair.private.write_bytes(
        key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    )
    pair.public.write_bytes(
        key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    return pair


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return make_keys(tmp_path)


@pytest.fixture
def settings(store_settings: SettingsFactory) -> Settings:
    return store_settings()


_PUBLISHED: dict[str, dict[str, bytes]] = {}


def publish_once(s3: S3Server, uri: str, settings: Settings) -> None:
    """Publish a model that is the same in every test of a module: read once, put back later."""
    folder = s3.root / uri.removeprefix("s3://") / ".weightstream"
    if uri in _PUBLISHED:
        s3.put_files(str(folder.relative_to(s3.root)), _PUBLISHED[uri])
    else:
        publish(uri, settings)
        _PUBLISHED[uri] = {path.name: path.read_bytes() for path in folder.iterdir()}


class _Files(BaseHTTPRequestHandler):
    """Whole files and single ranges, with an ETag, and no listing."""

    protocol_version = "HTTP/1.0"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        assert isinstance(self.server, WebServer)
        self.server.asked.append(self.path)
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        begin, end = 0, len(data)
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1, end)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(data[begin:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


class WebServer(ThreadingHTTPServer):
    """Serves `files`, by path."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Files)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(5)
