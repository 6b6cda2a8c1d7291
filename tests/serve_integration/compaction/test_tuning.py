"""What a person may set, and what is refused before it reaches the controller."""

import pytest

from weightstream.errors import UsageError
from weightstream.serve_integration.compaction.guard import Guard, Pace, Peaks
from weightstream.serve_integration.compaction.tuning import Tuning, parse, with_pairs


def test_pairs_change_what_they_name() -> None:
    tuned = with_pairs(Tuning(), ["keep-nodes=2", "stable_s=0.5", 'prices={"GPU": 3}'])
    assert tuned == Tuning(keep_nodes=2, stable_s=0.5, prices={"GPU": 3})


@pytest.mark.parametrize(
    "pair",
    [
        "keep_nodes",
        "keep_nodes=1.5",
        "keep_nodes=true",
        "keep_nodes=-1",
        "cooldown_s=NaN",
        "cooldown_s=Infinity",
        "stable_s=-2",
        "prices=3",
        'prices={"GPU": "much"}',
        "keep_node=1",
        "stable_s=soon",
    ],
)
def test_nonsense_is_refused(pair: str) -> None:
    with pytest.raises(UsageError):
        with_pairs(Tuning(), [pair])


def test_what_was_stored_may_be_of_another_version() -> None:
    with pytest.raises(UsageError, match="nothing is called 'later'"):
        parse({"later": 1})
    assert parse({}) == Tuning()


def test_rays_delay_holds_where_no_other_was_set() -> None:
    assert Tuning().pace(300).stable_s == 300
    assert Tuning(stable_s=0).pace(300).stable_s == 0


def test_nothing_is_done_until_the_fleet_has_stood_still() -> None:
    pace = Pace(stable_s=10)
    guard = Guard().seen(100, stable=True)
    assert guard.wait_s(104, pace) == 6
    assert guard.seen(105, stable=False).wait_s(200, pace) == float("inf")
    assert guard.seen(105, stable=False).seen(106, stable=True).wait_s(106, pace) == 10


def test_each_failure_in_a_row_doubles_the_wait_until_a_success() -> None:
    pace = Pace(stable_s=0, cooldown_s=1, backoff_s=30, backoff_max_s=100)
    guard, waits = Guard().seen(0, stable=True), []
    for _ in range(4):
        guard = guard.failed(0, pace)
        waits.append(guard.wait_s(0, pace))
    assert waits == [30, 60, 100, 100]
    assert guard.succeeded(0, pace).wait_s(0, pace) == 1
    assert guard.succeeded(0, pace).failed(0, pace).wait_s(0, pace) == 30


def test_peaks_are_remembered_as_long_as_they_may_come_again() -> None:
    peaks = Peaks().noted(0, {"a": 3, "b": 1}, 60).noted(10, {"a": 1, "b": 1}, 60)
    assert peaks.above({"a": 1, "b": 1}) == {"a": 2}
    assert peaks.noted(69, {"a": 1, "b": 1}, 60).above({"a": 1, "b": 1}) == {"a": 2}
    assert peaks.noted(71, {"a": 1, "b": 1}, 60).above({"a": 1, "b": 1}) == {}
