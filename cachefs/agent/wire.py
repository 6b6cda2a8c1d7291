"""What the agent and its clients say on the data socket: heads of JSON, and frames of eight bytes.

    client                                   agent
    head: hello, version          ──>
                                  <──        head: version, longest; the arena's descriptor
    head: read, blob, range       ──>
                                  <──        head: offset in the arena, or inline
                                  <──        frames: BYTES (each ~1 MiB), BEAT (twice a second)
                                  <──        frame: END; or FAILED, or BROKEN where another range
                                             may do better, and as many bytes of text
    one byte: the slot is free    ──>

`inline` has the bytes follow their BYTES frame. A plan is a head (`plan`) on a connection of its
own, which lasts as long as the plan. `refute`, answered by a head, says that what was read of a
blob is not what the origin has.
"""

import json
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightstream.cachefs.blob import Blob, Extent

VERSION = 1

BEAT, BYTES, END, FAILED, BROKEN = range(5)
FRAME = struct.Struct("<II")  # kind, count
FREE = b"f"

BEAT_S = 0.5
SILENCE_S = 2.0
"""An agent that says nothing for so long, not even BEAT, does not live."""

HEAD_BYTES = (
    4 << 20
)  # a plan of a model with 20,000 runs of tensors; everything else is below 1 KiB
_HEAD = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")


class WireError(ConnectionError):
    """The other side broke the protocol, or went away."""


class AgentRefusal(ConnectionError):
    """The agent says that it cannot read this."""


class AgentBusy(Exception):
    """The agent does not bring this range; it may bring the next one."""


def send_head(sock: socket.socket, message: Mapping[str, Any], descriptor: int = -1) -> None:
    """Send a message, with a descriptor if there is one to pass."""
    text = json.dumps(message, separators=(",", ":")).encode()
    data = _HEAD.pack(len(text)) + text
    if descriptor >= 0:
        sent = socket.send_fds(sock, [data], [descriptor])
        data = data[sent:]
    sock.sendall(data)


def receive_head(sock: socket.socket, most_bytes: int = HEAD_BYTES) -> dict[str, Any]:
    """Return a message; raises `WireError` for what is none."""
    return parse(receive_exactly(sock, head_length(receive_exactly(sock, _HEAD.size), most_bytes)))


def receive_greeting(sock: socket.socket) -> tuple[dict[str, Any], int]:
    """Return the agent's first message, and the descriptor that came with it (-1: none)."""
    data, descriptors, _, _ = socket.recv_fds(sock, _HEAD.size, 1)
    data += receive_exactly(sock, _HEAD.size - len(data)) if data else b""
    descriptor = descriptors[0] if descriptors else -1
    try:
        if not data:
            raise WireError("the agent closed the connection")
        return parse(receive_exactly(sock, head_length(data, HEAD_BYTES))), descriptor
    except BaseException:
        if descriptor >= 0:
            os.close(descriptor)
        raise


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """Return `count` bytes; raises `WireError` when there are no more."""
    data = bytearray()
    while len(data) < count:
        part = sock.recv(min(count - len(data), 1 << 16))
        if not part:
            raise WireError("the connection was closed")
        data += part
    return bytes(data)


def head_length(data: bytes, most_bytes: int) -> int:
    """Return the length that a head's first bytes announce."""
    (length,) = _HEAD.unpack(data)
    if not 2 <= length <= most_bytes:
        raise WireError(f"a message of {length} bytes")
    return int(length)


def parse(text: bytes) -> dict[str, Any]:
    """Return the message that a head's text is."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"not JSON: {text[:40]!r}") from error
    if not isinstance(message, dict):
        raise WireError(f"not a message: {text[:40]!r}")
    return message


def blob_to_json(blob: Blob) -> dict[str, Any]:
    """Return what `blob_of` takes."""
    return {"uri": blob.uri, "size": blob.size, "version": blob.version}


def blob_of(message: Mapping[str, Any]) -> Blob:
    """Return the blob that a message names."""
    return Blob(
        text_of(message, "uri"), count_of(message, "size"), text_of(message, "version", least=0)
    )


def extent_of(values: Any, blob: Blob) -> Extent:
    """Return an extent of a blob given as [start, stop]."""
    match values:
        case [int(start), int(stop)] if 0 <= start < stop <= blob.size:
            return Extent(start, stop)
    raise WireError(f"not an extent of {blob.size} bytes: {str(values)[:80]}")


def text_of(message: Mapping[str, Any], name: str, least: int = 1) -> str:
    """Return a text of a message."""
    value = message.get(name)
    if not isinstance(value, str) or not least <= len(value) <= 4096 or "\0" in value:
        raise WireError(f"{name} is not a text: {str(value)[:80]!r}")
    return value


def count_of(message: Mapping[str, Any], name: str) -> int:
    """Return a number of a message that counts something."""
    value = message.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise WireError(f"{name} is not a count: {str(value)[:80]!r}")
    return value


def peer(sock: socket.socket) -> tuple[int, int]:
    """Return process and user at the other end of a connection."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid


def is_trusted(uid: int) -> bool:
    """Say whether a user is this one, or root."""
    return uid in (os.geteuid(), 0)


def plan_message(root: str, wanted: Sequence[tuple[Blob, tuple[Extent, ...]]]) -> dict[str, Any]:
    """Return the request that tells an agent of a plan."""
    blobs = [
        {**blob_to_json(blob), "extents": [[e.start, e.stop] for e in extents]}
        for blob, extents in wanted
    ]
    return {"op": "plan", "root": root, "wanted": blobs}


@contextmanager
def socket_address(directory: Path, name: str) -> Iterator[str]:
    """Yield a path of a socket that fits into the 108 bytes of a socket's address."""
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{name}"
    finally:
        os.close(folder)
