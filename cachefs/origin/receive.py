"""From the socket into the caller's memory, with as few steps of Python as possible.

Plain TCP: `recv_into(view, n, MSG_WAITALL)` on a blocking socket moves a MiB in one system call
with the interpreter lock released. A Python timeout would make the descriptor non-blocking, and
MSG_WAITALL means nothing there; so the stall timeout is the kernel's SO_RCVTIMEO.
TLS: OpenSSL hands out one record (16 KiB) per call, whatever is asked for; but the thread need not
be woken for each. Here the time-out is Python's: its SSL object retries blocking reads for ever.

Measured: 8 MiB ranges of 512 MiB from nginx over loopback into huge pages, 2 shared cores, Python
3.11, median of 7 interleaved runs; GB/s and CPU seconds per GB of the client with 1, 2, 4 threads:

    response.readinto, steps of 1 MiB     1.71 0.35    1.51 0.46    1.41 0.49
    MSG_WAITALL, 1 MiB                    1.86 0.33    1.68 0.38    1.48 0.44
    MSG_WAITALL, 1 MiB, wake at 128 KiB   2.29 0.30    1.49 0.40    1.53 0.41
    MSG_WAITALL, 1 MiB, wake at 512 KiB   2.12 0.34    1.77 0.37    1.67 0.37

Steps of 256 KiB, 2 MiB and 8 MiB are no better than 1 MiB.

TLS 1.2 with AES-128, 4 threads, 768 MiB, medians of 3 on a busy machine: 0.93 CPU s/GB woken at
each segment, 0.85 at 64 KiB (128 to 512 KiB are no better). A MemoryBIO fed with 256 KiB or 1 MiB
at a time cost 1.19-1.39 where this cost 1.06, for its copies.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
import weakref
from typing import TYPE_CHECKING

from weightstream.cachefs.origin.windows import (
    FIRST_BYTES_S,
    LOOK_S,
    may_widen,
    round_trip_s,
    segment_bytes,
    set_window,
    shared_window,
)

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer


STEP_BYTES = 1 << 20
WAKE_BYTES = 512 << 10
TLS_WAKE_BYTES = 64 << 10
_RECORD_BYTES = (16 << 10) + 256
_BOUNDED: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""Connections whose window was bounded."""


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
    bound = _Bound(sock, transfer)
    step = min(STEP_BYTES, transfer.step_bytes)
    wake = min(WAKE_BYTES, step)
    calm_until = total - step - wake
    calm = done <= calm_until
    if calm:
        _wake_after(sock, wake)
    while done < total:
        if calm and done > calm_until:
            calm = False
            _wake_after(sock, 1)
        count = sock.recv_into(into[done:], min(step, total - done), socket.MSG_WAITALL)
        if count == 0:
            break
        done += count
        bound.got(count)
        transfer.advance(done - told)
        bound.asks()
        told = done
    if told < done:
        transfer.advance(done - told)
    return done


def _wake_after(sock: socket.socket, count: int) -> None:
    """Have the kernel wake the reading thread once `count` bytes lie ready, not at each segment.

    The last call of a range must run with 1: the kernel would wait for bytes that never come.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)


def _receive_tls(sock: ssl.SSLSocket, into: memoryview, done: int, transfer: Transfer) -> int:
    told, total = 0, len(into)
    bound = _Bound(sock, transfer)
    # What is left has at least as many bytes in TLS, but OpenSSL may hold two records of them.
    calm_until = total - TLS_WAKE_BYTES - 2 * _RECORD_BYTES
    calm = done <= calm_until
    if calm:
        _wake_after(sock, TLS_WAKE_BYTES)
    while done < total:
        if calm and done > calm_until:
            calm = False
            _wake_after(sock, 1)
        try:
            count = sock.recv_into(into[done:], total - done)
        except OSError as error:
            if told < done:
                transfer.advance(done - told)  # the next attempt begins behind these
                told = done
            if not (isinstance(error, TimeoutError) and calm and _has_bytes(sock)):
                raise
            calm = False  # a slow link: it does not bring as much in that time
            continue
        if count == 0:
            break
        done += count
        bound.got(count)
        if done - told >= min(STEP_BYTES, transfer.step_bytes):
            transfer.advance(done - told)
            told = done
        bound.asks()
    if told < done:
        transfer.advance(done - told)
    return done


class _Bound:
    """Bounds what is on its way on a stream that shares its link, by the part that it should have.

    What a kept connection was bounded to stays until it is asked for by a node alone.
    """

    def __init__(self, sock: socket.socket, transfer: Transfer) -> None:
        self._sock = sock
        self._share = transfer.link_share
        self._got, self._took_s, self._asked_s = 0, 0.0, time.monotonic()
        share = self._share()
        self._shares = share is not None
        if share is None or may_widen(sock):
            self._set(share, FIRST_BYTES_S)

    def asks(self) -> None:
        """Say that bytes are waited for from now on: what was between is not the stream's time."""
        if self._shares:
            self._asked_s = time.monotonic()

    def got(self, count: int) -> None:
        """Hear that `count` bytes came."""
        if not self._shares:
            return
        self._got += count
        self._took_s += time.monotonic() - self._asked_s
        if self._took_s < LOOK_S:
            return
        rate_bytes_s = self._got / self._took_s
        self._got, self._took_s = 0, 0.0
        self._set(self._share(), rate_bytes_s)

    def _set(self, share: float | None, rate_bytes_s: float) -> None:
        sock, window = self._sock, None
        self._shares = share is not None
        if share is not None:
            window = shared_window(share, rate_bytes_s, round_trip_s(sock), segment_bytes(sock))
        if window is not None:
            _BOUNDED.add(sock)
            set_window(sock, window)
        elif sock in _BOUNDED:
            _BOUNDED.discard(sock)
            set_window(sock, None)


def _has_bytes(sock: socket.socket) -> bool:
    """Say whether anything lies ready; from now on that is enough to wake the thread."""
    _wake_after(sock, 1)
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))
