"""Messages between the agent and the swarm's process: JSON, and bytes behind it."""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

_HEAD = struct.Struct("!II")
_MOST_BYTES = 256 << 20
"""The largest torrent that is made describes 4 Mi pieces by 20 bytes each."""

Message = Mapping[str, Any]


class FrameError(Exception):
    """What came is no message; the two sides are of one release, so this is a bug."""


def send(sock: socket.socket, message: Message, payload: bytes | memoryview = b"") -> None:
    """Send one message; OSError when the other side is gone, or silent for too long."""
    text = json.dumps(message).encode()
    sock.sendall(_HEAD.pack(len(text), len(payload)) + text)
    if payload:
        sock.sendall(payload)


def receive(sock: socket.socket) -> tuple[dict[str, Any], bytes] | None:
    """Wait for one message; None when the other side has closed."""
    head = _read(sock, _HEAD.size)
    if head is None:
        return None
    n_text, n_payload = _HEAD.unpack(head)
    if max(n_text, n_payload) > _MOST_BYTES:
        raise FrameError(f"a message of {n_text} and {n_payload} bytes")
    text, payload = _read(sock, n_text), _read(sock, n_payload)
    if text is None or payload is None:
        return None
    message = json.loads(text)
    if not isinstance(message, dict):
        raise FrameError("a message that is no object")
    return message, payload


def _read(sock: socket.socket, count: int) -> bytes | None:
    """Return exactly `count` bytes; None when it ends before."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = sock.recv_into(view[done:])
        if not got:
            return None
        done += got
    return bytes(data)
