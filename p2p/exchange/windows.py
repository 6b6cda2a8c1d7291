"""Pure policy: how much may be on its way to this node on one connection.

What is on its way is what a fault queues behind, at the slowest link: with 128 KiB on each of four
connections a fault of 1 MiB took 263 to 290 ms on a link of 200 Mbit/s, with 32 KiB 138 to 140,
with 16 KiB 111. But small windows mean more calls (1.37 and 1.76 CPU seconds where 128 KiB took
1.05), so they are for nodes that see faults.
"""

BULK_BYTES = 128 << 10
"""For those that see none. The kernel doubles it."""
_LEAST_BYTES = 16 << 10
_QUEUE_S = 0.005
"""What may wait in front of the link, at the rate at which all connections receive. Far above the
round trip between nodes, so it is never what limits the rate."""


def receive_window(rate_bytes_s: float, connections: int, sees_faults: bool) -> int:
    """Return the bytes for one of `connections` which receive `rate_bytes_s` together."""
    if not sees_faults:
        return BULK_BYTES
    share = rate_bytes_s * _QUEUE_S / max(1, connections)
    return int(min(BULK_BYTES, max(_LEAST_BYTES, share)))
