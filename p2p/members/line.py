"""A kept HTTP/1.1 connection that never blocks its thread.

A conversation is a generator: it yields what its socket has to be ready for and returns the answer,
so one thread holds hundreds of them and ends each at its deadline, whatever the other side does.
"""

import errno
import functools
import os
import re
import select
import selectors
import socket
import ssl
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from weightstream.p2p.members.addresses import Address

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_RECEIVE_BYTES = 64 << 10
_MOST_HEAD_BYTES = 8 << 10
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?")

Result = TypeVar("Result")
Talk = Generator[int, None, "Answer"]


class LineError(OSError):
    """The other side broke off, or said something that is no answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes

    @property
    def said(self) -> str:
        """Return the beginning of the body, for a message."""
        text = self.body[:200].decode("utf-8", "replace")
        return "".join(c if c.isprintable() else " " for c in text).strip()


class Line:
    """One address and at most one connection to it. Not thread-safe."""

    def __init__(
        self,
        address: Address,
        context: ssl.SSLContext | None,
        server_name: str,
        most_body_bytes: int,
    ) -> None:
        self.address = address
        self.certificate: bytes | None = None
        """What the other side has shown (DER); None without TLS."""
        self._context = context
        self._server_name = server_name
        self._most_body_bytes = most_body_bytes
        self._sock: socket.socket | None = None

    @property
    def local_host(self) -> str:
        """Return the address of this side of the connection."""
        return str(self._open().getsockname()[0])

    def fileno(self) -> int:
        """Return what to wait on when the conversation yields."""
        return self._open().fileno()

    def close(self) -> None:
        """Close the connection; the next conversation makes another."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def talk(self, request: Callable[[], bytes]) -> Talk:
        """Send a request, return the answer. It is made when the connection is there.

        It is made, and sent, again when the other side has closed the kept connection meanwhile: a
        signature is good for one. Raises `OSError`. A conversation that is given up closes the
        connection.
        """
        kept = self._sock is not None
        try:
            if not kept:
                yield from self._connect()
            try:
                return (yield from self._ask(request()))
            except OSError:
                if not kept:
                    raise
            self.close()
            yield from self._connect()
            return (yield from self._ask(request()))
        except BaseException:
            self.close()
            raise

    def _open(self) -> socket.socket:
        if self._sock is None:
            raise LineError("not connected")
        return self._sock

    def _connect(self) -> Generator[int, None, None]:
        host, port = self.address.host, self.address.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex((host, port))
        if code == errno.EINPROGRESS:
            yield WRITE
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        if self._context is not None:
            yield from self._shake_hands(sock, self._context)

    def _shake_hands(
        self, sock: socket.socket, context: ssl.SSLContext
    ) -> Generator[int, None, None]:
        self._sock = secure = context.wrap_socket(
            sock, server_hostname=self._server_name, do_handshake_on_connect=False
        )
        yield from _until_done(secure.do_handshake)
        self.certificate = secure.getpeercert(binary_form=True)

    def _ask(self, request: bytes) -> Talk:
        sock = self._open()
        rest = bytearray(request)
        while rest:
            sent = yield from _until_done(functools.partial(sock.send, bytes(rest)))
            del rest[:sent]
        data = bytearray()
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > _MOST_HEAD_BYTES:
                raise LineError("an answer with a head of more than 8 KiB")
            data += yield from self._receive()
        head = _parse_head(bytes(data[:end]))
        del data[: end + 4]
        if head.length > self._most_body_bytes:
            raise LineError(f"an answer of {head.length} bytes")
        while len(data) < head.length:
            data += yield from self._receive()
        if len(data) > head.length:
            raise LineError("more bytes than the answer has")
        if not head.keeps:
            self.close()
        return Answer(head.status, bytes(data))

    def _receive(self) -> Generator[int, None, bytes]:
        sock = self._open()
        data = yield from _until_done(lambda: sock.recv(_RECEIVE_BYTES))
        if not data:
            raise LineError("closed the connection")
        return data


def request(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """Return a request as it is sent."""
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def talk_until(line: Line, talk: Talk, deadline_s: float, stop: int) -> Answer:
    """Hold one conversation and wait for it, until a time (monotonic) or `stop` can be read."""
    try:
        while True:
            events = next(talk)
            poller = select.poll()
            poller.register(line.fileno(), select.POLLIN if events == READ else select.POLLOUT)
            poller.register(stop, select.POLLIN)
            left_s = deadline_s - time.monotonic()
            ready = dict(poller.poll(max(0.0, left_s) * 1000))
            if stop in ready:
                raise LineError("closed")
            if not ready:
                raise LineError("no answer in time")
    except StopIteration as done:
        answer = done.value
        assert isinstance(answer, Answer)
        return answer
    finally:
        talk.close()


def _until_done(act: Callable[[], Result]) -> Generator[int, None, Result]:
    while True:
        try:
            return act()
        except (BlockingIOError, ssl.SSLWantReadError):
            yield READ
        except ssl.SSLWantWriteError:
            yield WRITE


@dataclass(frozen=True, slots=True)
class _Head:
    status: int
    length: int
    keeps: bool


def _parse_head(head: bytes) -> _Head:
    first, *lines = head.split(b"\r\n")
    found = _STATUS.fullmatch(first)
    if found is None:
        raise LineError(f"no answer of HTTP/1.1: {first[:40]!r}")
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip()
        if fields.setdefault(name, value) != value and name == b"content-length":
            raise LineError("an answer of two lengths")
    length = fields.get(b"content-length", b"0" if found[2] == b"204" else b"")
    if b"transfer-encoding" in fields or not length.isdigit() or len(length) > 12:
        raise LineError("an answer without a length")
    keeps = found[1] == b"1" and fields.get(b"connection", b"").lower() != b"close"
    return _Head(int(found[2]), int(length), keeps)
