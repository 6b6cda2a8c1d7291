"""Pure policy: when one node's uplink holds everybody up, and who passes which block on instead.

A chunk goes from its home to all others of a mesh. Where the home reads faster than it can pass on,
the rest of the chunk leaves one uplink once for each receiver while other uplinks are idle: with 8
nodes on links of 200 Mbit/s up to 2.3 s for 8 MiB, the last chunks of every crowd, and those of a
home that died or lies. So the rest is scattered and gathered, as broadcasts of long messages are in
MPI: each receiver asks the home for its own blocks only, and the other receivers for theirs.

R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in
MPICH", 2005.
"""

from collections.abc import Mapping, Sequence

BLOCK_BYTES = 256 << 10
"""11 ms on a link of 200 Mbit/s: what a block waits for before it is passed on."""
LEAST_RECEIVERS = 3
"""Two would send each other half of what the home sends both: nothing is gained."""
_BEHIND_BYTES = 2 * BLOCK_BYTES
"""What receivers lack in the mean of what is here: less is on its way."""
_WORTH_S = 0.3
"""What it has to save: messages and requests cost some 50 ms."""


def scattered(
    sent: Mapping[str, int], position: int, total_bytes: int, rate_bytes_s: float
) -> tuple[str, ...]:
    """Return who is to share a chunk's rest among themselves; nobody when it gains little.

    `sent` says by receiver how much of the chunk's `total_bytes` it was sent, all together at
    `rate_bytes_s`; `position` how much has come from the origin.
    """
    rests = {node: total_bytes - count for node, count in sent.items()}
    receivers = sorted(node for node, rest in rests.items() if rest > BLOCK_BYTES)
    if len(receivers) < LEAST_RECEIVERS or rate_bytes_s <= 0:
        return ()
    behind = [position - sent[node] for node in receivers]
    if position < total_bytes and sum(behind) < _BEHIND_BYTES * len(behind):
        return ()  # the origin is what they wait for
    left = [rests[node] for node in receivers]
    # scattered, it leaves this uplink once, and each receiver's about as often
    gain_s = (sum(left) - 2 * max(left)) / rate_bytes_s
    return tuple(receivers) if gain_s >= _WORTH_S else ()


def block_giver(receivers: Sequence[str], block: int) -> str:
    """Return who asks the home for a block, and gives it to the other receivers."""
    return receivers[block % len(receivers)]
