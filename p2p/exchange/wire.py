"""HTTP/1.1 heads and bodies on a blocking socket, for both ends of the exchange.

Only what two of us need of each other: heads of at most 8 KiB, bodies of known length, interim 102
answers. Bodies are received straight into the caller's memory. Whatever breaks these rules raises
`WireError`; nothing here waits longer than the socket's own time limits, and a head that comes byte
by byte no longer than `HEAD_S`.
"""

import contextlib
import fcntl
import json
import socket
import ssl
import struct
import termios
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from weightstream.cachefs.origin.windows import round_trip_s, segment_bytes

HEAD_BYTES = 8 << 10
HEAD_S = 10.0
JSON_BYTES = 16 << 20
_MOST_BRACKETS = 64
"""No message nests deeper than two. At a parser's deepest point finalizers fail, by chance."""
_STEP_BYTES = 512 << 10
_WAKE_BYTES = 256 << 10
_MOST_WAITS = 32
_DRAIN_LOOK_S = 0.0003
_TCP_NOTSENT_LOWAT = 25
_UNSENT_BYTES = 128 << 10
"""How much of a bulk answer may lie in the kernel unsent: what a fault has to wait behind."""


class WireError(Exception):
    """The other side broke the rules, or closed in the middle."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's or an answer's first line and headers; header names in lower case."""

    first: str
    headers: Mapping[str, str]

    @property
    def length(self) -> int:
        """Return the body's length; 0 when none is stated."""
        return self.number("content-length")

    def number(self, name: str) -> int:
        """Return the header's number; 0 when it is not there."""
        text = self.headers.get(name, "0")
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise WireError(f"bad {name} {text[:40]!r}")
        return int(text)

    @property
    def status(self) -> int:
        """Return an answer's status."""
        parts = self.first.split(" ", 2)
        if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdigit():
            raise WireError(f"no answer of HTTP: {self.first[:60]!r}")
        return int(parts[1])


def request(method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """Return a request's bytes."""
    return _message(f"{method} {path} HTTP/1.1", headers, len(body)) + body


def answer(status: int, reason: str, headers: Mapping[str, str], length: int) -> bytes:
    """Return the head of an answer with a body of `length` bytes."""
    return _message(f"HTTP/1.1 {status} {reason}", headers, length)


def processing(chain: tuple[str, ...], progress: int) -> bytes:
    """Return an interim answer: bytes are waited for, through the nodes of `chain`.

    `progress` counts all bytes that this node has got so far, of whatever.
    """
    waits = f"Waits: {','.join(chain[:_MOST_WAITS])}\r\n" if chain else ""
    return f"HTTP/1.1 102 Processing\r\nProgress: {progress}\r\n{waits}\r\n".encode()


def _message(first: str, headers: Mapping[str, str], length: int) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


class Channel:
    """One connection; used by one thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._pending = b""
        self._wakes_after = 1
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT_BYTES)

    @property
    def is_plain(self) -> bool:
        """Say that bytes go out as they are: sendfile works."""
        return not isinstance(self.sock, ssl.SSLSocket)

    @property
    def round_trip_s(self) -> float:
        """Return the shortest that the kernel has seen, in seconds; 0 where it keeps none."""
        return round_trip_s(self.sock)

    @property
    def segment_bytes(self) -> int:
        """Return how many bytes a segment carries; 0 where there are none."""
        return segment_bytes(self.sock)

    def set_timeouts(self, seconds: float) -> None:
        """Bound every send and receive."""
        if not self.is_plain:
            self.sock.settimeout(seconds)
            return
        timeval = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
        self.sock.settimeout(None)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def read_head(self) -> Head | None:
        """Return the next head; None when the other side closed between messages."""
        until_s = 0.0
        while (end := self._pending.find(b"\r\n\r\n")) < 0:
            if len(self._pending) > HEAD_BYTES:
                raise WireError("a head of more than 8 KiB")
            self._wake_after(1)
            more = self.sock.recv(4096)
            if not more:
                if self._pending:
                    raise WireError("closed in a head")
                return None
            until_s = until_s or time.monotonic() + HEAD_S
            if time.monotonic() > until_s:
                raise WireError(f"no whole head in {HEAD_S:g} s")
            self._pending += more
        text, self._pending = self._pending[:end], self._pending[end + 4 :]
        return _parse(text)

    def read_json(self, length: int) -> dict[str, Any]:
        """Return a body that is a JSON object."""
        if length > JSON_BYTES:
            raise WireError(f"a body of {length} bytes")
        body = bytearray(length)
        self.read_body(memoryview(body), lambda count: None)
        if body.count(b"[") + body.count(b"{") > _MOST_BRACKETS:
            raise WireError("a body that is nested")
        try:
            found = json.loads(body or b"{}")
        except ValueError as error:
            raise WireError("a body that is no JSON") from error
        if not isinstance(found, dict):
            raise WireError("a body that is no JSON object")
        return found

    def read_body(self, into: memoryview, advance: Callable[[int], None]) -> None:
        """Fill `into`; `advance` hears of every few hundred KiB, in order."""
        early = min(len(self._pending), len(into))
        if early:
            into[:early] = self._pending[:early]
            self._pending = self._pending[early:]
            advance(early)
        done, total = early, len(into)
        while done < total:
            self._wake_after(_WAKE_BYTES if total - done > _WAKE_BYTES else 1)
            count = self.sock.recv_into(into[done:], min(_STEP_BYTES, total - done))
            if not count:
                raise WireError(f"closed after {done} of {total} bytes")
            done += count
            advance(count)

    def _wake_after(self, count: int) -> None:
        """Have the kernel wake us when `count` bytes are there, not at each segment."""
        if self.is_plain and count != self._wakes_after:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._wakes_after = count

    def drain(self, seconds: float) -> None:
        """Wait until the other side's kernel has all that was sent, so long at most."""
        until_s, look_s = time.monotonic() + seconds, _DRAIN_LOOK_S
        while (fd := self.sock.fileno()) >= 0 and time.monotonic() < until_s:
            if not any(fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4))):
                return
            time.sleep(look_s)
            look_s = min(2 * look_s, 16 * _DRAIN_LOOK_S)

    def shut(self) -> None:
        """Wake who waits on it, with an error; from any thread."""
        with contextlib.suppress(OSError):  # not connected any more
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # not TLS's: it has a reader

    def close(self) -> None:
        """Close at once; wakes who waits on it."""
        with contextlib.suppress(OSError):  # not connected any more
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


def _parse(text: bytes) -> Head:
    lines = text.decode("latin-1").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise WireError(f"bad header {line[:40]!r}")
        headers[name.lower()] = value.strip()
    return Head(lines[0], headers)
