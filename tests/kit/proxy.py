"""A TCP HTTP proxy between clients and a real S3 server that injects faults and counts bytes.

The client takes the proxy for the endpoint: it signs for the proxy's host and port, and the Host
header goes on unchanged, so that the server's own check of the signature still holds.

rclone is not S3 in five points (rclone 1.75, measured); the proxy makes up for them, so that tests
meet what S3 answers:
  * a range is answered with status 200 and Content-Range; S3 says 206;
  * `If-Match` is ignored; S3 answers 412 when the ETag differs;
  * an unsigned request gets 400 UnsupportedAlgorithm; S3 says 403 AccessDenied;
  * no checksums; S3 states them on HEAD with `x-amz-checksum-mode: ENABLED` (see `checksums`);
  * any session token is accepted (see `EXPIRED_TOKEN`).
`FaultProxy(..., faithful=False)` passes rclone's answers on as they are.

One thread per client connection, each with one connection to the server: blocking sockets and
`recv_into` release the interpreter lock, so one process relays over 1 GB/s.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType

from tests.kit import faults as f
from tests.kit.link import Exchange, Hangup, Link, Terms
from tests.kit.wire import Request, WireClosed

LINGER_RESET = struct.pack("ii", 1, 0)


class FaultProxy:
    """A context manager; `url` is the endpoint to give to clients."""

    def __init__(self, upstream: tuple[str, int], faithful: bool = True) -> None:
        self.upstream = upstream
        self.faithful = faithful
        self.checksums: dict[str, tuple[str, str]] = {}
        """Path -> full-object checksum header (name, value) that HEAD answers state."""
        self._rules: list[tuple[f.When, f.Fault, list[int]]] = []
        self._exchanges: list[Exchange] = []
        self._in_flight = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.host, self.port = self._listener.getsockname()[:2]
        self.connections = 0

    @property
    def url(self) -> str:
        """Return the endpoint URL."""
        return f"http://{self.host}:{self.port}"

    def add(self, when: f.When, *faults: f.Fault) -> None:
        """Add faults; each counts its matching requests from now on."""
        with self._lock:
            self._rules += [(when, fault, [0]) for fault in faults]

    def clear(self) -> None:
        """Forget all faults and all exchanges."""
        with self._lock:
            self._rules.clear()
            self._exchanges.clear()

    def exchanges(self, when: f.When | None = None) -> list[Exchange]:
        """Return copies of the exchanges so far, in order; `when` selects by key and method."""
        with self._lock:
            found = [replace(exchange) for exchange in self._exchanges]
        if when is None:
            return found
        return [e for e in found if when.key in e.path and when.method in ("", e.method)]

    def body_bytes(self, key: str = "") -> int:
        """Return how many body bytes of successful GETs of matching paths were sent to clients."""
        gets = self.exchanges(f.When(key=key, method="GET"))
        return sum(e.body_bytes for e in gets if e.status < 300)

    def __enter__(self) -> "FaultProxy":
        self._spawn(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._sockets:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=10)

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="fault-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._spawn(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        terms = Terms(
            self.upstream, self.faithful, self.checksums, self._recorded, self._stopping.wait
        )
        link = Link(terms, sock)
        with self._tracked(sock), sock:
            try:
                while link.exchange():
                    pass
            except Hangup as hangup:
                if hangup.reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            except (OSError, WireClosed):
                pass
            finally:
                link.close_upstream()

    @contextmanager
    def _tracked(self, sock: socket.socket) -> Iterator[None]:
        with self._lock:
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)

    @contextmanager
    def _recorded(self, request: Request) -> Iterator[tuple[Exchange, list[f.Fault]]]:
        with self._lock:
            self._in_flight += 1
            exchange = Exchange(
                request.method, request.path, request.range, time.monotonic(), self._in_flight
            )
            self._exchanges.append(exchange)
            hit = [fault for when, fault, seen in self._rules if _count(when, seen, request)]
        try:
            yield exchange, hit
        finally:
            with self._lock:
                exchange.ended_s = time.monotonic()
                self._in_flight -= 1


def _count(when: f.When, seen: list[int], request: Request) -> bool:
    if not when.matches(request):
        return False
    seen[0] += 1
    return when.hits(seen[0])
