"""TLS with an authority of our own, and proxies from the environment."""

import datetime
import ipaddress
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tests.cachefs.origin.servers import Handler, Notes, RawServer, header, partial

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.origin import open_origin
from weightstream.cachefs.origin.tls import make_context
from weightstream.errors import AccessDeniedError, LoadCancelled, UnavailableError, UsageError
from weightstream.settings import Settings

Start = Callable[[Handler], RawServer]
CONTENT = bytes(range(256)) * 8192  # 2 MiB


def well(head: str, sock: socket.socket) -> bool:
    sock.sendall(partial(CONTENT, head))
    return True


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "throwaway")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return path


class TlsServer(RawServer):
    """The raw server behind TLS."""

    def __init__(self, handler: Handler, certificate: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        super().__init__(handler)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def _serve(self, sock: socket.socket) -> None:
        try:
            wrapped = self._context.wrap_socket(sock, server_side=True)
        except OSError:
            sock.close()
            return
        super()._serve(wrapped)


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[TlsServer]:
    server = TlsServer(well, certificate)
    yield server
    server.close()


def read(url: str, settings: Settings, options: dict[str, object], size: int = 1 << 21) -> bytes:
    origin = open_origin(url, settings, options)
    into = bytearray(size)
    blob = Blob(f"{url}/f", len(CONTENT), "abc")
    for _ in range(2):
        origin.read_into(blob, 0, memoryview(into), Notes())
    origin.close()
    return bytes(into)


def test_own_authority(tls_server: TlsServer, certificate: Path, settings: Settings) -> None:
    assert read(tls_server.url, settings, {"verify": str(certificate)}) == CONTENT
    assert tls_server.connections == 1


def test_authority_from_the_environment(
    tls_server: TlsServer, certificate: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert read(tls_server.url, settings, {}) == CONTENT


def test_s3_uses_the_authority_that_botocore_uses(
    tls_server: TlsServer, certificate: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    options = {"key": "kkkk", "secret": "ssss", "endpoint_url": tls_server.url}
    origin = open_origin("s3://b", settings, options)
    into = bytearray(len(CONTENT))
    origin.read_into(Blob("s3://b/f", len(CONTENT), "abc"), 0, memoryview(into), Notes())
    assert into == CONTENT


def test_unknown_authority_is_refused_for_good(tls_server: TlsServer, settings: Settings) -> None:
    with pytest.raises(UnavailableError, match="TLS verification failed") as caught:
        read(tls_server.url, settings, {})
    assert not caught.value.transient


def test_verification_can_be_switched_off(tls_server: TlsServer, settings: Settings) -> None:
    assert read(tls_server.url, settings, {"verify": False}) == CONTENT


def test_missing_bundle(tls_server: TlsServer, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="CA bundle"):
        read(tls_server.url, settings, {"verify": str(tmp_path / "none.pem")})


def test_cancelled_tls_read_gives_no_ciphertext(
    tls_server: TlsServer, certificate: Path, settings: Settings
) -> None:
    def stall(head: str, sock: socket.socket) -> bool:
        sock.sendall(partial(CONTENT, head)[: 1 << 20])
        return tls_server.rest()

    tls_server.handler = stall
    notes, into = Notes(), bytearray(len(CONTENT))
    origin = open_origin(tls_server.url, settings, {"verify": str(certificate)})

    def cancel() -> None:
        assert notes.registered.wait(5)
        callback = notes.callback
        assert callback is not None
        threading.Event().wait(0.3)
        callback()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(LoadCancelled):
        origin.read_into(
            Blob(f"{tls_server.url}/f", len(CONTENT), "abc"), 0, memoryview(into), notes
        )
    canceller.join()
    done = sum(notes.advanced)
    assert into[:done] == CONTENT[:done]


@pytest.mark.parametrize("sent", [0, 10, 1_000_000])
def test_a_stalled_tls_body_ends_in_time(
    tls_server: TlsServer, certificate: Path, settings: Settings, sent: int
) -> None:
    def serve(head: str, sock: socket.socket) -> bool:
        data = partial(CONTENT, head)
        sock.sendall(data[: data.index(b"\r\n\r\n") + 4 + sent])
        return tls_server.rest()

    tls_server.handler = serve
    into, notes = bytearray(len(CONTENT)), Notes()
    origin = open_origin(tls_server.url, settings, {"verify": str(certificate)})
    with pytest.raises(UnavailableError, match="no byte within the stall timeout"):
        origin.read_into(
            Blob(f"{tls_server.url}/f", len(CONTENT), "abc"), 0, memoryview(into), notes
        )
    done = sum(notes.advanced)
    assert sent - 10_000 <= done <= sent  # the answer's head shares a record with the first bytes
    assert into[:done] == CONTENT[:done]


def test_a_slow_tls_link_is_no_stall(
    tls_server: TlsServer, certificate: Path, settings: Settings
) -> None:
    """Slower than the kernel's wake-up mark within the stall timeout, but never silent."""
    size = 300_000

    def serve(head: str, sock: socket.socket) -> bool:
        data = partial(CONTENT, head)
        for start in range(0, len(data), 20_000):
            sock.sendall(data[start : start + 20_000])
            time.sleep(0.1)
        return True

    tls_server.handler = serve
    into = bytearray(size)
    origin = open_origin(tls_server.url, settings, {"verify": str(certificate)})
    blob = Blob(f"{tls_server.url}/f", len(CONTENT), "abc")
    for start in range(2):  # the second time on the same connection
        origin.read_into(blob, start, memoryview(into), Notes())
        assert into == CONTENT[start : start + size]
    origin.close()


def test_of_what_the_system_allows_the_cheapest_good_cipher_comes_first() -> None:
    usual = {cipher["name"] for cipher in ssl.create_default_context().get_ciphers()}
    context = make_context()
    names = [cipher["name"] for cipher in context.get_ciphers()]
    older = [name for name in names if not name.startswith("TLS_")]
    assert set(names) == usual
    assert older[0].startswith("ECDHE")
    assert "AES128-GCM" in older[0]
    assert context.security_level == ssl.create_default_context().security_level
    assert context.minimum_version == ssl.create_default_context().minimum_version


@dataclass
class ProxyServer:
    """A forward proxy: CONNECT tunnels, and absolute-form requests, which it answers itself."""

    server: RawServer
    wants: str = ""

    def __call__(self, head: str, sock: socket.socket) -> bool:
        if header(head, "Proxy-Authorization") != self.wants:
            sock.sendall(b"HTTP/1.1 407 Who\r\nContent-Length: 0\r\n\r\n")
            return False
        method, target, _ = head.split(" ", 2)
        if method != "CONNECT":
            sock.sendall(partial(CONTENT, head))
            return target.startswith("http://")
        host, _, port = target.partition(":")
        with socket.create_connection((host, int(port))) as upstream:
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            _pump(sock, upstream)
        return False


def _pump(left: socket.socket, right: socket.socket) -> None:
    other = {left: right, right: left}
    while True:
        for ready in select.select(list(other), [], [], 10)[0]:
            data = ready.recv(65536)
            if not data:
                return
            other[ready].sendall(data)


@pytest.fixture
def proxy(raw_server: Start) -> ProxyServer:
    server = raw_server(lambda head, sock: made(head, sock))
    made = ProxyServer(server)
    return made


def test_http_goes_through_the_proxy_in_absolute_form(
    proxy: ProxyServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:hunter2@127.0.0.1:{proxy.server.port}")
    proxy.wants = "Basic bWU6aHVudGVyMg=="
    assert read("http://far.invalid", settings, {}) == CONTENT
    assert proxy.server.heads[0].startswith("GET http://far.invalid/f HTTP/1.1")
    assert header(proxy.server.heads[0], "Host") == "far.invalid"


def test_https_goes_through_a_tunnel(
    proxy: ProxyServer,
    tls_server: TlsServer,
    certificate: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", f"http://me:hunter2@127.0.0.1:{proxy.server.port}")
    proxy.wants = "Basic bWU6aHVudGVyMg=="
    assert read(tls_server.url, settings, {"verify": str(certificate)}) == CONTENT
    assert [head.split(" ")[0] for head in proxy.server.heads] == ["CONNECT"]


def test_a_proxy_that_wants_credentials(
    proxy: ProxyServer, tls_server: TlsServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://me:hunter3@127.0.0.1:{proxy.server.port}")
    proxy.wants = "Basic bWU6aHVudGVyMg=="
    with pytest.raises(AccessDeniedError, match=f"proxy 127.0.0.1:{proxy.server.port}") as caught:
        read(tls_server.url, settings, {})
    assert "hunter" not in str(caught.value)


def test_no_proxy(
    proxy: ProxyServer, raw_server: Start, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server.port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert read(raw_server(well).url, settings, {}) == CONTENT
    assert proxy.server.connections == 0
