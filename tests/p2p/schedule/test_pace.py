"""Who is too slow to wait for."""

from weightstream.p2p.schedule import Pace, is_slow

MIB = 1 << 20


def test_far_less_than_the_others_is_slow() -> None:
    paces = {"a": Pace(10 * MIB, 2.0), "b": Pace(9 * MIB, 2.0), "c": Pace(MIB, 2.0)}
    assert is_slow(paces, "c")
    assert not is_slow(paces, "a")


def test_waiting_in_vain_counts() -> None:
    paces = {"a": Pace(10 * MIB, 2.0), "b": Pace(9 * MIB, 2.0), "c": Pace(0, 2.0)}
    assert is_slow(paces, "c")


def test_a_quarter_is_not_slow_yet() -> None:
    paces = {"a": Pace(8 * MIB, 4.0), "b": Pace(8 * MIB, 4.0), "c": Pace(2 * MIB, 4.0)}
    assert not is_slow(paces, "c")


def test_nobody_is_judged_within_a_second_and_a_half() -> None:
    paces = {"a": Pace(10 * MIB, 4.0), "b": Pace(9 * MIB, 4.0), "c": Pace(0, 1.4)}
    assert not is_slow(paces, "c")


def test_one_other_is_not_enough_to_compare_with() -> None:
    paces = {"a": Pace(10 * MIB, 2.0), "b": Pace(9 * MIB, 0.5), "c": Pace(0, 2.0)}
    assert not is_slow(paces, "c")


def test_a_stranger_is_not_slow() -> None:
    assert not is_slow({}, "a")


def test_the_rate_of_nobody_asked_is_nought() -> None:
    assert Pace().rate_bytes_s == 0


def test_how_many_times_slower_is_the_callers_to_say() -> None:
    paces = {"a": Pace(8 * MIB, 4.0), "b": Pace(8 * MIB, 4.0), "c": Pace(3 * MIB, 4.0)}
    assert is_slow(paces, "c", 2.0)
    assert not is_slow(paces, "c", 3.0)
    assert not is_slow(paces, "c", 8.0)
