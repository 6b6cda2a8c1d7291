"""Who gets through a member's port: real sockets, real handshakes."""

import contextlib
import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from cryptography import x509
from tests.p2p.identity.conftest import OTHER_SECRET, IdentityFactory

from weightstream.p2p.identity import PEER_NAME, certificates, instance_of


class Door:
    """Takes one connection as a member does; `seen` is what came through it."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        assert context is not None
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self.seen: Future[bytes] = Future()
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        try:
            sock, _ = self._listener.accept()
            sock.settimeout(3)
            with self._context.wrap_socket(sock, server_side=True) as member:
                data = member.recv(100)
                member.sendall(b"answer to " + data)
                self.seen.set_result(data)
        except OSError as error:
            self.seen.set_exception(error)

    def close(self) -> None:
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def door(identity: IdentityFactory) -> Iterator[Door]:
    with contextlib.closing(Door(identity("server").server_context())) as made:
        yield made


def ask(door: Door, context: ssl.SSLContext, name: str = PEER_NAME) -> ssl.SSLSocket:
    """Shake hands, send and read: TLS 1.3 tells a client that it is refused when it reads."""
    sock = socket.create_connection(door.address, 3)
    with context.wrap_socket(sock, server_hostname=name) as secure:
        secure.sendall(b"hello")
        assert secure.recv(100) == b"answer to hello"
        return secure


def test_members_know_each_other(door: Door, identity: IdentityFactory) -> None:
    context = identity("client").client_context()
    assert context is not None
    sock = socket.create_connection(door.address, 3)
    with context.wrap_socket(sock, server_hostname=PEER_NAME) as secure:
        assert secure.version() == "TLSv1.3"
        secure.sendall(b"hello")
        assert secure.recv(100) == b"answer to hello"
        shown = secure.getpeercert(binary_form=True)
    assert shown is not None
    assert len(instance_of(shown)) == 32
    assert door.seen.result(5) == b"hello"


def test_the_certificate_shown_tells_the_instance(identity: IdentityFactory) -> None:
    server, client = identity("server"), identity("client")
    door = Door(server.server_context())
    context = client.client_context()
    assert context is not None
    sock = socket.create_connection(door.address, 3)
    with contextlib.closing(door), context.wrap_socket(sock, server_hostname=PEER_NAME) as secure:
        shown = secure.getpeercert(binary_form=True)
    assert shown is not None
    assert instance_of(shown) == server.instance != client.instance
    assert isinstance(door.seen.exception(5) or b"", OSError | bytes)


def test_contexts_are_made_once(identity: IdentityFactory) -> None:
    one = identity("a")
    assert one.client_context() is one.client_context()
    assert one.server_context() is one.server_context()
    off = identity("b", peer_encryption="off")
    assert off.client_context() is None
    assert off.server_context() is None


def test_a_client_of_another_secret_is_refused(door: Door, identity: IdentityFactory) -> None:
    stranger = identity("client", OTHER_SECRET).client_context()
    assert stranger is not None
    with pytest.raises(ssl.SSLCertVerificationError):
        ask(door, stranger)
    assert isinstance(door.seen.exception(5), OSError)


def test_a_client_of_another_secret_that_trusts_everybody_is_refused(
    door: Door, identity: IdentityFactory
) -> None:
    stranger = identity("client", OTHER_SECRET).client_context()
    assert stranger is not None
    stranger.check_hostname = False
    stranger.verify_mode = ssl.CERT_NONE
    with pytest.raises(OSError, match=r"(?i)unknown ca|reset|closed|eof"):
        ask(door, stranger)
    assert isinstance(door.seen.exception(5), ssl.SSLError)


def test_a_client_without_a_certificate_is_refused(door: Door) -> None:
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    with pytest.raises(OSError, match=r"(?i)certificate required|reset|closed|eof"):
        ask(door, nobody)
    assert isinstance(door.seen.exception(5), ssl.SSLError)


def test_an_old_version_of_tls_is_refused(door: Door, identity: IdentityFactory) -> None:
    context = identity("client").client_context()
    assert context is not None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        ask(door, context)
    assert isinstance(door.seen.exception(5), ssl.SSLError)


def test_a_plain_client_is_refused(door: Door) -> None:
    with socket.create_connection(door.address, 3) as sock:
        sock.sendall(b"GET /v1/hello HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"answer" not in sock.recv(100)
    assert isinstance(door.seen.exception(5), ssl.SSLError)


def test_a_server_of_another_secret_is_refused(identity: IdentityFactory) -> None:
    context = identity("client").client_context()
    assert context is not None
    with contextlib.closing(Door(identity("server", OTHER_SECRET).server_context())) as impostor:
        with pytest.raises(ssl.SSLCertVerificationError):
            ask(impostor, context)
        assert isinstance(impostor.seen.exception(5), OSError)


def test_a_server_of_another_name_is_refused(door: Door, identity: IdentityFactory) -> None:
    context = identity("client").client_context()
    assert context is not None
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        ask(door, context, "elsewhere.example")
    assert isinstance(door.seen.exception(5), OSError)


def test_a_node_whose_clock_is_behind_is_served(identity: IdentityFactory) -> None:
    server, client = identity("server"), identity("client")
    context = client.client_context()
    assert server.keys is not None
    assert context is not None
    ahead = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=23)
    made = certificates.make_credentials(server.keys, server.node, now=ahead)
    with contextlib.closing(Door(certificates.server_context(made))) as door:
        ask(door, context)
        assert door.seen.result(5) == b"hello"


def test_a_certificate_for_a_swarm_is_of_the_same_authority(identity: IdentityFactory) -> None:
    made = identity("a").credentials("*")
    certificate = x509.load_pem_x509_certificate(made.certificate)
    authority = x509.load_pem_x509_certificate(identity("b").credentials("*").authority)
    certificate.verify_directly_issued_by(authority)
