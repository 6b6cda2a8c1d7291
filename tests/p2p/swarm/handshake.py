"""BitTorrent's first words, said by hand."""

import hashlib
import socket
import ssl

_GREETING = b"\x13BitTorrent protocol"


def info_hash(description: bytes) -> bytes:
    """Return the name of a torrent: the hash of its only entry, `info`."""
    start, end = b"d4:info", b"e"
    assert description.startswith(start)
    assert description.endswith(end)
    return hashlib.sha1(description[len(start) : -len(end)], usedforsecurity=False).digest()


def shaken(
    there: tuple[str, int], source: str, name: bytes, context: ssl.SSLContext | None = None
) -> bool:
    """Say whether who calls from `source` and knows a torrent's name is answered."""
    try:
        with socket.create_connection(there, 10, (source, 0)) as sock:
            if context is None:
                return _greet(sock, name)
            with context.wrap_socket(sock, server_hostname=name.hex()) as talking:
                return _greet(talking, name)
    except (OSError, TimeoutError):
        return False


def greeted(sock: socket.socket, name: bytes) -> None:
    """Answer who calls for a torrent."""
    assert sock.recv(68, socket.MSG_WAITALL).startswith(_GREETING)
    sock.sendall(_words(name))


def _greet(sock: socket.socket, name: bytes) -> bool:
    sock.sendall(_words(name))
    return sock.recv(20) == _GREETING


def _words(name: bytes) -> bytes:
    return _GREETING + bytes(8) + name + b"-XX0000-abcdefghijkl"
