"""Which schedule holds when."""

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.errors import UsageError
from weightstream.serve_integration.standby.schedule import parse, steps_at

MONDAY = datetime(2026, 6, 1)


def at(schedule: str, day: int, clock: str) -> int:
    hour, minute = map(int, clock.split(":"))
    return steps_at(parse(schedule), MONDAY + timedelta(days=day, hours=hour, minutes=minute))


def test_a_number_alone_always_holds() -> None:
    assert at("2", 3, "04:00") == 2


def test_the_end_of_a_window_is_outside() -> None:
    steps = [at("08:00-20:00=2", 0, clock) for clock in ("07:59", "08:00", "19:59", "20:00")]
    assert steps == [0, 2, 2, 0]


def test_the_last_that_holds_counts() -> None:
    schedule = "1, mon-fri 08:00-20:00=3, wed 12:00-13:00=0"
    assert at(schedule, 0, "12:30") == 3
    assert at(schedule, 2, "12:30") == 0
    assert at(schedule, 5, "12:30") == 1


def test_a_night_belongs_to_the_day_on_which_it_begins() -> None:
    schedule = "fri 22:00-06:00=4"
    assert at(schedule, 4, "23:00") == 4
    assert at(schedule, 5, "05:59") == 4
    assert at(schedule, 5, "06:00") == 0
    assert at(schedule, 4, "05:00") == 0


def test_days_run_past_sunday() -> None:
    schedule = "sat-mon 00:00-24:00=1"
    assert [at(schedule, day, "12:00") for day in range(7)] == [1, 0, 0, 0, 0, 1, 1]


BAD = ["", "two", "-1", "08:00-20:00", "08:00=2", "25:00-26:00=1", "08:60-09:00=1", "moo 1", "1,,2"]


@pytest.mark.parametrize("text", [*BAD, "mon 2", "xyz-fri 08:00-20:00=1"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@given(begin=st.integers(0, 1439), end=st.integers(0, 1439), when=st.integers(0, 7 * 1440 - 1))
def test_every_day_s_window_and_its_opposite_share_the_day(begin: int, end: int, when: int) -> None:
    def clock(minute: int) -> str:
        return f"{minute // 60:02}:{minute % 60:02}"

    moment = MONDAY + timedelta(minutes=when)
    one = steps_at(parse(f"{clock(begin)}-{clock(end)}=1"), moment)
    other = steps_at(parse(f"{clock(end)}-{clock(begin)}=1"), moment)
    assert one + other == (2 if begin == end else 1)
