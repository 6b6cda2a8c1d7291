"""From the socket into the caller's memory, with as few steps of Python as possible.

Plain TCP: `recv_into(view, n, MSG_WAITALL)` on a blocking socket moves a MiB in one system call
with the interpreter lock released. A Python timeout would make the descriptor non-blocking, and
MSG_WAITALL means nothing there; so the stall timeout is the kernel's SO_RCVTIMEO.
TLS: OpenSSL hands out one record (16 KiB) per call, whatever is asked for.
"""

from __future__ import annotations

import socket
import ssl
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer


STEP_BYTES = 1 << 20


def set_kernel_timeouts(sock: socket.socket, timeout_s: float) -> None:
    """Bound every blocking send and receive on the socket."""
    micros = max(1, int(timeout_s * 1e6))
    timeval = struct.pack("@ll", micros // 1_000_000, micros % 1_000_000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def receive(sock: socket.socket, into: memoryview, done: int, transfer: Transfer) -> int:
    """Fill `into` from the socket, `done` bytes being there already; return how many are.

    Less than asked for means that the other side closed. Raises TimeoutError or BlockingIOError
    when no byte came for the stall timeout.
    """
    if isinstance(sock, ssl.SSLSocket):
        return _receive_tls(sock, into, done, transfer)
    sock.setblocking(True)
    return _receive_plain(sock, into, done, transfer)


def _receive_plain(sock: socket.socket, into: memoryview, done: int, transfer: Transfer) -> int:
    told, total = 0, len(into)
    while done < total:
        count = sock.recv_into(into[done:], min(STEP_BYTES, total - done), socket.MSG_WAITALL)
        if count == 0:
            break
        done += count
        transfer.advance(done - told)
        told = done
    if told < done:
        transfer.advance(done - told)
    return done


def _receive_tls(sock: ssl.SSLSocket, into: memoryview, done: int, transfer: Transfer) -> int:
    told, total = 0, len(into)
    while done < total:
        count = sock.recv_into(into[done:], total - done)
        if count == 0:
            break
        done += count
        if done - told >= STEP_BYTES:
            transfer.advance(done - told)
            told = done
    if told < done:
        transfer.advance(done - told)
    return done
