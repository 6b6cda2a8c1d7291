"""Scripted misbehaviour on a raw socket, and a transfer that takes notes."""

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

Handler = Callable[[str, socket.socket], bool]
"""Gets the head of a request and the socket; returns whether to keep the connection."""


class RawServer:
    """Answers each request with whatever bytes the handler sends; counts connections."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.heads: list[str] = []
        self.connections = 0
        self._closing = threading.Event()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        self._open.append(sock)
        try:
            while (head := read_head(sock)) is not None:
                self.heads.append(head)
                if not self.handler(head, sock):
                    break
        except OSError:
            pass
        finally:
            sock.close()

    def rest(self) -> bool:
        """Say nothing for as long as the test runs."""
        self._closing.wait(30)
        return False

    def close(self) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                continue
        self._thread.join(5)


def read_head(sock: socket.socket) -> str | None:
    data = b""
    while not data.endswith(b"\r\n\r\n"):
        more = sock.recv(1)
        if not more:
            return None
        data += more
    return data.decode("latin-1")


def header(head: str, name: str) -> str:
    for line in head.split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name.lower():
            return value.strip()
    return ""


def asked_range(head: str) -> tuple[int, int]:
    start, _, last = header(head, "Range").removeprefix("bytes=").partition("-")
    return int(start), int(last) + 1


def answer(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def partial(content: bytes, head: str, **headers: str) -> bytes:
    """Return the right answer to a range request."""
    start, stop = asked_range(head)
    where = f"bytes {start}-{stop - 1}/{len(content)}"
    return answer("206 Partial Content", content[start:stop], Content_Range=where, **headers)


@dataclass
class Notes:
    """A transfer that remembers what it was told."""

    advanced: list[int] = field(default_factory=list)
    on_advance: Callable[[int], None] | None = None
    callback: Callable[[], None] | None = None
    registered: threading.Event = field(default_factory=threading.Event)
    urgent: bool = False
    step_bytes: int = 1 << 20
    is_fresh: bool = False
    share: Callable[[], float | None] = lambda: None

    def link_share(self) -> float | None:
        return self.share()

    def advance(self, count: int) -> None:
        self.advanced.append(count)
        if self.on_advance is not None:
            self.on_advance(count)

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        self.callback = callback
        if callback is not None:
            self.registered.set()
