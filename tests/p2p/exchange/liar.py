"""A peer that speaks the protocol and does what it should not."""

import json
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

from blake3 import blake3

from weightstream.p2p.exchange.crowds import pack_flags

Answer = Callable[[socket.socket, int], None]
"""Answers for a chunk on a connection; whatever it does, the connection ends afterwards."""


class Liar:
    """Says that it holds all of a blob; `answer` decides what it gives. A context manager."""

    def __init__(
        self, node: str, n_chunks: int, answer: Answer, tls: ssl.SSLContext | None = None
    ) -> None:
        self.node = node
        self._tls = tls
        self._held = pack_flags(bytes([1]) * n_chunks)
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self.asked: list[int] = []
        threading.Thread(target=self._accept, daemon=True, name="weightstream-liar").start()

    def __enter__(self) -> "Liar":
        return self

    def __exit__(self, *error: object) -> None:
        for sock in (self._listener, *self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(sock)
            threading.Thread(
                target=self._talk, args=(sock,), daemon=True, name="weightstream-liar"
            ).start()

    def _talk(self, plain: socket.socket) -> None:
        with suppress(OSError), self._wrapped(plain) as sock:
            while head := self._read_head(sock):
                path = head.split(b" ")[1].decode()
                if path.startswith("/v1/chunk/"):
                    chunk = int(path.rsplit("/", 1)[1])
                    self.asked.append(chunk)
                    self._answer(sock, chunk)
                    return
                said = {"joined": False, "reads_origin": False, "begun": True, "start": 0}
                body = json.dumps(said | {"node": self.node, "held": self._held}).encode()
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    def _wrapped(self, plain: socket.socket) -> socket.socket:
        if self._tls is None:
            return plain
        wrapped = self._tls.wrap_socket(plain, server_side=True)
        self._open.append(wrapped)
        return wrapped

    @staticmethod
    def _read_head(sock: socket.socket) -> bytes:
        head = b""
        while b"\r\n\r\n" not in head:
            more = sock.recv(4096)
            if not more:
                return b""
            head += more
        first, _, rest = head.partition(b"\r\n\r\n")
        length = [line for line in first.split(b"\r\n") if line.lower().startswith(b"content-len")]
        left = (int(length[0].split(b":")[1]) if length else 0) - len(rest)
        while left > 0:
            left -= len(sock.recv(min(left, 65536)))
        return first


def give(body: bytes, digest: bytes | None = None) -> bytes:
    """Return a whole answer with a chunk's bytes."""
    end = digest if digest is not None else blake3(body).digest()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) + 32) + body + end
