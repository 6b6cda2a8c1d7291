"""Just enough HTTP/1.1 for a proxy that may lie on purpose: message heads and body lengths.

A real HTTP library would refuse to send most of what the fault proxy has to send.
"""

import re
import socket
from dataclasses import dataclass, replace
from urllib.parse import unquote

MAX_HEAD_BYTES = 64 << 10
Headers = tuple[tuple[str, str], ...]


class WireClosed(Exception):
    """The other side closed the connection where a message should have begun or gone on."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the client sent it."""

    method: str
    target: str
    headers: Headers

    @property
    def path(self) -> str:
        """Return the decoded path without its query: `/bucket/key`."""
        return unquote(self.target.split("?", 1)[0])

    @property
    def range(self) -> tuple[int, int] | None:
        """Return the asked range as [start, stop), None where there is none with both ends."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", get(self.headers, "range") or "")
        return (int(found[1]), int(found[2]) + 1) if found else None

    def encode(self) -> bytes:
        """Return the head as bytes."""
        return _encode(f"{self.method} {self.target} HTTP/1.1", self.headers)


@dataclass(frozen=True, slots=True)
class Response:
    """The head of one response."""

    status: int
    reason: str
    headers: Headers

    def with_headers(self, *changes: tuple[str, str | None]) -> "Response":
        """Return a copy with these headers set; None removes one."""
        gone = {name.lower() for name, _ in changes}
        kept = tuple(h for h in self.headers if h[0].lower() not in gone)
        return replace(self, headers=kept + tuple((n, v) for n, v in changes if v is not None))

    def encode(self) -> bytes:
        """Return the head as bytes."""
        return _encode(f"HTTP/1.1 {self.status} {self.reason}", self.headers)


def get(headers: Headers, name: str) -> str | None:
    """Return the first header of that name."""
    return next((value for key, value in headers if key.lower() == name), None)


class Connection:
    """A socket with the bytes that were read past the last message head."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = bytearray()

    def read_request(self) -> Request | None:
        """Read the next request head; None when the client hung up between requests."""
        head = self._read_head()
        if head is None:
            return None
        line, headers = _decode(head)
        method, target, _ = line.split(" ", 2)
        return Request(method, target, headers)

    def read_response(self) -> Response:
        """Read the next final response head (1xx are skipped)."""
        while True:
            head = self._read_head()
            if head is None:
                raise WireClosed("closed before a response")
            line, headers = _decode(head)
            status = int(line.split(" ", 2)[1])
            if status >= 200:
                return Response(status, (*line.split(" ", 2), "")[2], headers)

    def recv_into(self, into: memoryview) -> int:
        """Read some body bytes, at least one."""
        if self._rest:
            count = min(len(into), len(self._rest))
            into[:count] = self._rest[:count]
            del self._rest[:count]
            return count
        count = self.sock.recv_into(into)
        if count == 0:
            raise WireClosed("closed in mid-body")
        return count

    def read_exactly(self, count: int) -> bytes:
        """Read `count` body bytes."""
        body = bytearray(count)
        view, at = memoryview(body), 0
        while at < count:
            at += self.recv_into(view[at:])
        return bytes(body)

    def read_chunked(self) -> bytes:
        """Read a whole body in chunked transfer coding."""
        body = b""
        while size := int(self._read_line().split(b";")[0], 16):
            body += self.read_exactly(size)
            self._read_line()
        while self._read_line():
            pass
        return body

    def _read_line(self) -> bytes:
        while b"\r\n" not in self._rest:
            self._receive()
        line, _, rest = bytes(self._rest).partition(b"\r\n")
        self._rest = bytearray(rest)
        return line

    def _read_head(self) -> bytes | None:
        while (end := self._rest.find(b"\r\n\r\n")) < 0:
            if len(self._rest) > MAX_HEAD_BYTES:
                raise WireClosed("no end of the message head")
            if not self._receive(begun=bool(self._rest)):
                return None
        head = bytes(self._rest[:end])
        del self._rest[: end + 4]
        return head

    def _receive(self, begun: bool = True) -> bool:
        data = self.sock.recv(64 << 10)
        if not data and begun:
            raise WireClosed("closed in mid-message")
        self._rest += data
        return bool(data)


def _decode(head: bytes) -> tuple[str, Headers]:
    line, *fields = head.decode("latin-1").split("\r\n")
    pairs = (field.partition(":") for field in fields)
    return line, tuple((name.strip(), value.strip()) for name, _, value in pairs)


def _encode(line: str, headers: Headers) -> bytes:
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"{line}\r\n{fields}\r\n".encode("latin-1")
