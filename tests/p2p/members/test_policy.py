"""What the answers mean: pure functions, a clock that is a number."""

import pytest

from weightstream.p2p.members import policy
from weightstream.p2p.members.addresses import Address
from weightstream.p2p.members.hello import Hello
from weightstream.p2p.members.policy import Record

pytestmark = pytest.mark.usefixtures("real_beats")

A, B, C = (Address("10.0.0.1", port) for port in (1, 2, 3))


def hello(node: str, instance: str = "") -> Hello:
    return Hello(node, "z", "1", instance)


def alive(node: str, at_s: float, instance: str = "") -> Record:
    return policy.answered(Record(), hello(node, instance), at_s, at_s)


def names(records: dict[Address, Record], now_s: float) -> list[tuple[str, int]]:
    return [(m.node, m.port) for m in policy.look(records, "me", "i", now_s).members]


def test_who_never_answered_is_no_member() -> None:
    assert not policy.is_alive(Record(), 0)
    assert not policy.is_alive(policy.failed(Record(), 0), 0)


def test_a_member_is_out_three_seconds_after_the_first_failure() -> None:
    record = alive("a", 10)
    for sent_s in (11.0, 12.0, 13.0):
        record = policy.failed(record, sent_s)
    assert policy.next_death_s([record, alive("b", 10)], 13) == 14.0
    assert policy.is_alive(record, 13.9)
    assert not policy.is_alive(record, 14.0)
    assert policy.next_death_s([record], 14) is None
    assert policy.is_alive(policy.answered(record, hello("a"), 14.5, 14.6), 14.6)


def test_an_answer_to_a_hello_from_before_the_suspicion_does_not_clear_it() -> None:
    record = policy.suspected(alive("a", 10), 11.5)
    assert not policy.is_alive(record, 11.5)
    late = policy.answered(record, hello("a"), 11.0, 11.9)
    assert not policy.is_alive(late, 12)
    assert policy.is_alive(policy.answered(late, hello("a"), 12.0, 12.1), 12.1)


def test_oneself_is_no_member() -> None:
    assert names({A: alive("me", 1), B: alive("a", 1)}, 1) == [("a", 2)]


def test_a_copy_of_oneself_is_reported() -> None:
    assert policy.look({A: alive("me", 1, "i")}, "me", "i", 1).doubles == frozenset()
    assert policy.look({A: alive("me", 1)}, "me", "i", 1).doubles == frozenset()
    view = policy.look({A: alive("me", 1, "j")}, "me", "i", 1)
    assert view.doubles == {("me", A, A)}
    assert view.members == ()


def test_the_later_of_two_namesakes_is_left_out() -> None:
    first = policy.answered(alive("a", 1), hello("a"), 5, 5)
    records = {B: first, A: alive("a", 3)}
    assert names(records, 5) == [("a", 2)]
    records[A] = policy.answered(records[A], hello("a"), 6, 6)
    assert policy.look(records, "me", "i", 6).doubles == {("a", B, A)}
    records[B] = policy.failed(first, 6)
    assert names(records, 6) == [("a", 1)]


def test_a_node_that_moved_is_no_namesake() -> None:
    old = policy.failed(alive("a", 1), 2)
    view = policy.look({A: old, B: alive("a", 3)}, "me", "i", 3)
    assert view.doubles == frozenset()
    assert [m.port for m in view.members] == [2]


def test_one_process_at_two_addresses_is_no_namesake() -> None:
    records = {A: alive("a", 1, "x"), B: alive("a", 2, "x")}
    records[A] = policy.answered(records[A], hello("a", "x"), 3, 3)
    view = policy.look(records, "me", "i", 3)
    assert view.doubles == frozenset()
    assert [m.port for m in view.members] == [1]


def test_another_node_at_a_known_address_joins_anew() -> None:
    record = policy.answered(alive("a", 1), hello("b"), 9, 9)
    assert record.joined_s == 9
    assert policy.answered(record, hello("b"), 10, 10).joined_s == 9


def test_members_are_sorted_by_name() -> None:
    records = {A: alive("c", 1), B: alive("a", 2), C: alive("b", 3)}
    assert [name for name, _ in names(records, 3)] == ["a", "b", "c"]


def test_crowds_are_asked_less_often_but_not_who_fails() -> None:
    for record in (None, Record(), alive("a", 1), policy.failed(Record(), 1)):
        assert policy.beat_s(2, record, 2) == policy.beat_s(100, record, 2) == 1.0
        assert policy.beat_s(1000, record, 2) == 5.0
    failing = policy.failed(alive("a", 1), 1.5)
    assert policy.beat_s(1000, failing, 2) == 1.0
    assert policy.beat_s(1000, failing, 9) == 5.0
