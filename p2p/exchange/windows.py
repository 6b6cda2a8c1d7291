"""Pure policy: how much may be on its way to this node on one connection.

What is on its way waits in front of the slowest link, and a fault waits behind it: with 128 KiB on
each of four connections a fault of 1 MiB took 263 to 290 ms on a link of 200 Mbit/s, with 32 KiB
138 to 140, with 16 KiB 111. Small windows mean more calls (1.76 CPU seconds for 256 MiB where
128 KiB took 1.05), so they are for nodes that see faults; and on fast links, where as much waits
for a shorter time, they are large.
"""

BULK_BYTES = 128 << 10
"""The most, and what those get that see no faults. The kernel doubles it."""
FAULT_BYTES = 208 << 10
"""What a fault gets, on a connection that bulk may have had before: on one of 16 KiB a chunk of 1
MiB took 0.7 s behind a sender's queue of 40 ms. More than `net.core.rmem_max` of most machines is
not given."""
_LEAST_BYTES = 16 << 10
_LEAST_SEGMENTS = 8
"""A window of less than a segment stalls a sender for 200 ms at a time: over the loopback device,
with its segments of 64 KiB, 16 KiB gave 1 MB/s. The kernel counts more than a segment's bytes."""
_QUEUE_S = 0.005
_ROUND_TRIPS = 2
"""What may be on its way, in time at the rate at which all connections receive: more than a round
trip holds, or the window would be what limits the rate."""


def receive_window(
    rate_bytes_s: float, connections: int, round_trip_s: float, segment_bytes: int
) -> int:
    """Return the bytes for one of `connections` which receive `rate_bytes_s` together."""
    share = rate_bytes_s * (_QUEUE_S + _ROUND_TRIPS * round_trip_s) / max(1, connections)
    return int(min(BULK_BYTES, max(_LEAST_BYTES, _LEAST_SEGMENTS * segment_bytes, share)))
