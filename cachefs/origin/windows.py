"""How much may be on its way on one connection from an origin whose link nodes share.

Streams that fill a queue share it by luck. Measured, 8 nodes that each read from one origin by one
stream, links of 100 and 200 Mbit/s with queues of 1 MB, cubic: a stream got a tenth of its share
until its connection was given up, and chunks were read twice; 1.40 and 1.44 of the bound. With the
window bounded few starved: 1.14 and 1.26. All get about the same, by the part of the link that is
theirs: with windows by their own rates who was first stayed twice as fast as the others for
seconds, and had more than its uplink could pass on. Streams that are fast are left to the kernel:
its windows grow to megabytes, which no program may ask for.
"""

import contextlib
import socket
import sys

LOOK_S = 0.25
"""A stream's rate is looked at so often. Not only once: the first one has the link to itself for
a moment, and were it left alone then, the others starved."""
FIRST_BYTES_S = 6e6
"""What a stream's rate is taken for that begins; half of it where no share is known yet. Unbounded
until the first look, whoever was first by a tenth of a second had its first chunk in half of the
time that the others took, and more than its uplink could pass on."""
_LEAST_BYTES = 64 << 10
"""The kernel doubles it; with 32 KiB the origin's link was not filled (1.25 of the bound)."""
_MOST_BYTES = 208 << 10
"""`net.core.rmem_max` of most machines: more is not given."""
_LEAST_SEGMENTS = 8
"""A window of less than a segment stalls a sender for 200 ms at a time; the loopback device's have
64 KiB."""
_QUEUE_S = 0.02
_ROUND_TRIPS = 2
"""More than a round trip holds, or the window would be what limits the rate."""
_SO_BUF_LOCK = 72
"""Linux 5.15: take back that a program has set a buffer's size."""
_MIN_RTT_AT = 148
"""Where `tcpi_min_rtt` (microseconds) is in `struct tcp_info` of linux/tcp.h."""


def shared_window(
    share_bytes_s: float, rate_bytes_s: float, round_trip_s: float, segment_bytes: int
) -> int | None:
    """Return what `SO_RCVBUF` is to be for a stream of this rate that should have this share of its
    link; None: leave it to the kernel.

    A share is an estimate: it counts as half of the rate at least, which carries the rate where a
    round trip takes up to 10 ms more than the shortest, and as twice the rate at most.
    """
    bytes_s = min(max(share_bytes_s, rate_bytes_s / 2), rate_bytes_s * 2)
    share = int(bytes_s * (_QUEUE_S + _ROUND_TRIPS * round_trip_s))
    window = max(_LEAST_BYTES, _LEAST_SEGMENTS * segment_bytes, share)
    return None if window > _MOST_BYTES else window


def set_window(sock: socket.socket, window: int | None) -> None:
    """Bound what is on its way to a socket; None: leave it to the kernel again.

    It widens from where it is, and not before more comes in a round trip than ever before: so it
    begins with the most that may be asked for.
    """
    bytes_ = _MOST_BYTES if window is None else window
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, bytes_)
    if window is not None:
        return
    with contextlib.suppress(OSError):  # an older kernel: that has to do
        sock.setsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK, 0)


def may_widen(sock: socket.socket) -> bool:
    """Say whether a window that was bounded can be left to the kernel again."""
    try:
        sock.getsockopt(socket.SOL_SOCKET, _SO_BUF_LOCK)
    except OSError:
        return False
    return True


def round_trip_s(sock: socket.socket) -> float:
    """Return the shortest that the kernel has seen, in seconds; 0 where it keeps none."""
    if sock.family == socket.AF_UNIX:
        return 0.0
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT_AT + 4)
    return int.from_bytes(info[_MIN_RTT_AT:], sys.byteorder) / 1e6


def segment_bytes(sock: socket.socket) -> int:
    """Return how many bytes a segment carries; 0 where there are none."""
    if sock.family == socket.AF_UNIX:
        return 0
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
