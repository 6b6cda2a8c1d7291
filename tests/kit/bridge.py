"""A passage for TCP between two nodes that can be slow, or silent without ending a connection."""

import socket
import threading
from contextlib import suppress

_STEP = 4 << 10


class Bridge:
    """Passes on to `host:port` what comes to `address`; a context manager.

    `rate_bytes_s` limits what comes back through each connection. While `passes` is cleared
    nothing goes either way, and nobody is told: a partition.
    """

    def __init__(self, to: str) -> None:
        host, _, port = to.rpartition(":")
        self._to = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.rate_bytes_s: float | None = None
        self.passes = threading.Event()
        self.passes.set()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def __enter__(self) -> "Bridge":
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self.passes.set()
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _spawn(self, target: object, *args: object) -> None:
        assert callable(target)
        thread = threading.Thread(target=target, args=args, daemon=True, name="bridge")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            with suppress(OSError):
                sock, _ = self._listener.accept()
                self._sockets.append(sock)
                other = socket.create_connection(self._to, 10)
                other.settimeout(None)
                self._sockets.append(other)
                self._spawn(self._pass, sock, other, False)
                self._spawn(self._pass, other, sock, True)

    def _pass(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_STEP):
                if back and self.rate_bytes_s is not None:
                    self._closing.wait(len(data) / self.rate_bytes_s)
                self.passes.wait()
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
