"""JSON lines over a stream socket that never makes its owner wait."""

import json
import socket
from collections.abc import Mapping
from typing import Any

_READ_BYTES = 1 << 16
# A line is a few hundred bytes. Whoever sends more than this without a newline, or leaves more
# unread, does not speak this protocol.
_MOST_BYTES = 4 << 20


class ChannelClosed(ConnectionError):
    """The other side went away, or broke the protocol."""


class Channel:
    """One end of a connection; the owner watches its descriptor and calls `receive` and `flush`."""

    def __init__(self, end: socket.socket, received: bytes = b"", unsent: bytes = b"") -> None:
        end.setblocking(False)
        self._socket = end
        self._received = received
        self._unsent = unsent

    @property
    def fileno(self) -> int:
        """Return its descriptor."""
        return self._socket.fileno()

    @property
    def is_waiting(self) -> bool:
        """Return whether something waits to be sent."""
        return bool(self._unsent)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one line, or keep it for `flush`."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what waits, as far as that goes without waiting."""
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent, socket.MSG_NOSIGNAL)
                self._unsent = self._unsent[sent:]
        except BlockingIOError:
            if len(self._unsent) > _MOST_BYTES:
                raise ChannelClosed("nobody reads what is sent") from None
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> list[dict[str, Any]]:
        """Return the lines that have arrived; raise `ChannelClosed` when no more will."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not data:
            raise ChannelClosed("end of file")
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > _MOST_BYTES:
            raise ChannelClosed("a line without an end")
        return [_message(line) for line in lines]

    def kept(self) -> tuple[bytes, bytes]:
        """Return what was received and sent in part: what a successor needs to go on."""
        return self._received, self._unsent

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _message(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise ChannelClosed(f"not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise ChannelClosed(f"not a message: {line[:80]!r}")
    return message
