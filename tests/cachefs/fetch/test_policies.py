"""Retry, concurrency and hedge: pure functions, tested without a clock."""

import pytest

from weightstream.cachefs.fetch.concurrency import Concurrency, Window
from weightstream.cachefs.fetch.hedge import lags, most
from weightstream.cachefs.fetch.retry import delay_s
from weightstream.errors import AccessDeniedError, ThrottledError, UnavailableError

MB = 1_000_000
RESET = UnavailableError("reset")


def window(rate_mb_s: float, saturated: bool = True, throttled: bool = False) -> Window:
    return Window(rate_mb_s * MB, saturated, throttled)


def climb(link_mb_s: float, per_range_mb_s: float, windows: int, limit: int = 32) -> Concurrency:
    """Run the policy against a link where each range brings a fixed rate up to the link's."""
    state = Concurrency(limit=limit)
    for _ in range(windows):
        state = state.after(window(min(link_mb_s, per_range_mb_s * state.target)))
    return state


def test_a_fast_link_with_slow_connections_reaches_the_limit() -> None:
    assert climb(link_mb_s=100_000, per_range_mb_s=90, windows=6).target == 32


def test_a_link_that_four_ranges_fill_stays_near_four() -> None:
    assert climb(link_mb_s=125, per_range_mb_s=90, windows=15).target == 4


def test_the_limit_holds() -> None:
    assert climb(100_000, 90, windows=50, limit=10).target <= 10


def test_throttling_halves_and_then_holds() -> None:
    state = Concurrency(target=16).after(window(500, throttled=True))
    assert state.target == 8
    assert state.after(window(500)).target == 8


def test_throttling_never_stops_everything() -> None:
    assert Concurrency(target=1).after(window(1, throttled=True)).target == 1


def test_idle_slots_say_nothing_about_the_link() -> None:
    state = Concurrency()
    assert state.after(window(1000, saturated=False)) == state


def test_new_requests_are_given_time_to_bring_something() -> None:
    """The window after a climb sees the old rate; that is not held against the climb."""
    state = Concurrency().after(window(400))
    assert state.target == 8
    assert state.after(window(400)).after(window(800)).target == 16


def test_after_a_hold_the_link_is_probed_again() -> None:
    settled = climb(125, 90, windows=15)
    for _ in range(30):
        settled = settled.after(window(min(100_000, 90 * settled.target)))
    assert settled.target > 4


def test_lasting_errors_are_not_retried() -> None:
    assert delay_s(AccessDeniedError("no"), 0, 0.0, 60.0, 0.5) is None


def test_delays_grow_and_stay_bounded() -> None:
    delays = [delay_s(RESET, failures, 0.0, 60.0, 0.99) or 0.0 for failures in range(30)]
    assert delays == sorted(delays)
    assert delays[0] < 0.06
    assert delays[-1] <= 5.0


def test_jitter_spreads_the_waits() -> None:
    low, high = delay_s(RESET, 5, 0.0, 60.0, 0.0), delay_s(RESET, 5, 0.0, 60.0, 0.999)
    assert low is not None
    assert high is not None
    assert high > 1.9 * low


def test_retry_after_is_a_lower_bound() -> None:
    assert delay_s(ThrottledError("slow down", 7.0), 0, 0.0, 60.0, 0.0) == 7.0


@pytest.mark.parametrize(("idle_s", "expected"), [(0.0, True), (59.9, False)])
def test_a_wait_never_passes_the_deadline(idle_s: float, expected: bool) -> None:
    assert (delay_s(ThrottledError("slow down", 1.0), 0, idle_s, 60.0, 0.0) is not None) is expected


@pytest.mark.parametrize(
    ("elapsed_s", "silent_s", "typical_s", "expected"),
    [
        (0.5, 0.5, 0.1, False),  # less than a second is nothing
        (1.2, 1.1, 0.1, True),  # silent for over a second
        (3.0, 0.0, 0.1, True),  # trickles, at thirty times its peers' time
        (3.0, 0.0, 1.0, False),
        (5.0, 3.0, 1.0, False),  # slow link: patience is four typical times
        (5.0, 4.5, 1.0, True),
        (100.0, 0.2, None, False),  # nothing to compare with
    ],
)
def test_stragglers(
    elapsed_s: float, silent_s: float, typical_s: float | None, expected: bool
) -> None:
    assert lags(elapsed_s, silent_s, typical_s) is expected


def test_most_of_a_flow_is_never_hedged() -> None:
    assert [most(n) for n in (1, 4, 8, 32)] == [1, 1, 2, 8]
