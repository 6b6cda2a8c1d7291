"""Peers that answer hellos over real sockets, with real TLS, well or badly."""

import contextlib
import http.server
import json
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.conftest import SettingsFactory
from tests.p2p.identity.conftest import IdentityFactory, SecretFactory, identity, secret_file

from weightstream.p2p.identity import Identity
from weightstream.p2p.members import Membership, open_membership, policy

__all__ = ["IdentityFactory", "SecretFactory", "identity", "secret_file"]


class HelloServer:
    """Serves /v1/hello as an exchange does; `stop` and `start` it at the same port."""

    def __init__(self, identity: Identity, host: str = "127.0.0.1") -> None:
        self.identity = identity
        self.answers: dict[str, Any] = {}
        self.hellos = 0
        self.connections = 0
        self._host = host
        self.port = 0
        self._server: _Server | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"{self._host}:{self.port}"

    def start(self) -> None:
        self._server = _Server((self._host, self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut()
            self._server = None

    def hello(self) -> bytes:
        who = {"node": self.identity.node, "zone": self.identity.zone, "version": "1"}
        if self.identity.server_context() is None:
            who["instance"] = self.identity.instance
        return json.dumps(who | self.answers).encode()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], owner: HelloServer) -> None:
        self.owner = owner
        self.socks: list[socket.socket] = []
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, address = super().get_request()
        self.owner.connections += 1
        return sock, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        context = self.owner.identity.server_context()
        request.settimeout(5)
        if context is not None:
            request = context.wrap_socket(request, server_side=True)
        self.socks.append(request)
        with request:
            super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients are refused on purpose."""

    def cut(self) -> None:
        """End connections; the threads that serve them close them."""
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        owner = self.server.owner
        owner.hellos += 1
        refusal = owner.identity.refusal(self.headers.get("Authorization"), "GET", self.path)
        body = owner.hello() if refusal is None else refusal.encode()
        self.send_response(200 if refusal is None else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class RudeServer:
    """Answers each connection with what a function writes, which may take its time."""

    def __init__(self, rude: Callable[[socket.socket], object]) -> None:
        self._rude = rude
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.connections = 0
        self._socks: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._socks.append(sock)
                threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._rude(sock)

    def close(self) -> None:
        for sock in (self._listener, *self._socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def until(holds: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until something holds; fail when it does not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            pytest.fail(f"did not come true in {timeout_s} s")
        time.sleep(0.01)


def nodes(membership: Membership) -> list[str]:
    return [member.node for member in membership.members()]


ServerFactory = Callable[..., HelloServer]
RudeFactory = Callable[[Callable[[socket.socket], object]], RudeServer]
MembershipFactory = Callable[..., Membership]


@pytest.fixture
def hello_server(identity: IdentityFactory) -> Iterator[ServerFactory]:
    """Start a node of this name that answers hellos."""
    made: list[HelloServer] = []

    def make(node: str, host: str = "127.0.0.1", **settings: Any) -> HelloServer:
        made.append(HelloServer(identity(node, **settings), host))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def rude_server() -> Iterator[RudeFactory]:
    """Start a server of bad manners."""
    made: list[RudeServer] = []

    def make(rude: Callable[[socket.socket], object]) -> RudeServer:
        made.append(RudeServer(rude))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def membership(
    identity: IdentityFactory, store_settings: SettingsFactory
) -> Iterator[MembershipFactory]:
    """Open the membership of a node, `me` by default."""
    made: list[Membership] = []

    def make(
        peers: str, who: Identity | None = None, port: int = 7470, **settings: Any
    ) -> Membership:
        values = {"peers": peers, **settings}
        made.append(open_membership(store_settings(**values), who or identity("me"), port))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(autouse=True)
def _quick_beats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beat ten times as fast as in life, but where a test is marked to be about the real times."""
    if "real_beats" not in request.fixturenames:
        monkeypatch.setattr(policy, "BEAT_S", 0.1)
        monkeypatch.setattr(policy, "ANSWER_S", 0.4)
        monkeypatch.setattr(policy, "DEAD_S", 0.6)


@pytest.fixture
def real_beats() -> None:
    """Keep the times of the heartbeat as they are."""


def tls_flood(context: ssl.SSLContext) -> Callable[[socket.socket], object]:
    """Return a rude server's function that is well-mannered until TLS stands, then floods."""

    def flood(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as secure:
            secure.recv(4096)
            while True:
                secure.sendall(b"x" * 65536)

    return flood
