"""Pure policy: which range in flight lags so far behind its peers that it is asked for twice."""

_LEAST_S = 1.0
_FACTOR = 4.0
_SHARE = 4


def lags(elapsed_s: float, silent_s: float, typical_s: float | None) -> bool:
    """Say whether a range that runs for `elapsed_s` and is silent for `silent_s` is a straggler.

    `typical_s` is the median time of the flow's finished ranges, None when there is none yet.
    Silence alone is enough after a second or four typical times; a trickle when it took as long
    beyond what its peers need.
    """
    patience = max(_LEAST_S, _FACTOR * (typical_s or 0.0))
    if silent_s > patience:
        return True
    return typical_s is not None and elapsed_s > 2 * patience


def most(in_flight: int) -> int:
    """Return how many of a flow's ranges may be hedged at a time.

    When more than a few are silent it is the link that stalls: asking for everything twice would
    cost a slab for each, and the link twice the bytes as soon as it moves again.
    """
    return max(1, in_flight // _SHARE)
