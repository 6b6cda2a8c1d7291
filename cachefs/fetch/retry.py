"""Pure policy: whether, and after how long, a failed range is asked for again."""

from weightstream.errors import ThrottledError, WeightstreamError

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 5.0


def delay_s(
    error: WeightstreamError, failures: int, idle_s: float, deadline_s: float, jitter: float
) -> float | None:
    """Return how long to wait before the next attempt, or None to give up.

    `failures` counts those since the last byte arrived, `idle_s` the seconds since then, `jitter`
    is uniform in [0, 1). Exponential with full jitter between half and whole, as AWS advises; an
    origin's own Retry-After is a lower bound. Gives up when the wait would pass the deadline.
    """
    if not error.transient:
        return None
    backoff = min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2 ** min(failures, 10))
    wait = backoff * (0.5 + jitter / 2)
    if isinstance(error, ThrottledError) and error.retry_after_s is not None:
        wait = max(wait, error.retry_after_s)
    return wait if idle_s + wait < deadline_s else None
