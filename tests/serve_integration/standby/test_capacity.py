"""The total that is asked for: what is used, whole nodes, and the room beyond."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.errors import UsageError
from weightstream.serve_integration.standby.capacity import (
    Room,
    bundles,
    fits,
    parse_bundle,
    retreat,
)

CPU = {"CPU": 1.0}


def room(total: float, free: float, name: str = "a", **more: float) -> Room:
    return Room(name, {"CPU": total} | more, {"CPU": free} | more)


def test_nothing_is_asked_for_when_nothing_shall_wait() -> None:
    assert bundles([room(4, 1)], CPU, 0) == []


def test_room_on_busy_nodes_counts_and_only_the_rest_is_asked_for() -> None:
    assert bundles([room(4, 1)], CPU, 1) == [{"CPU": 4}]
    assert bundles([room(4, 1)], CPU, 3) == [{"CPU": 4}, CPU, CPU]


def test_idle_nodes_are_held_by_the_room_alone() -> None:
    assert bundles([room(4, 4), room(4, 4)], CPU, 2) == [CPU, CPU]


def test_pieces_of_room_are_no_room() -> None:
    """Two halves are free, on two nodes; a replica that needs one node whole fits on neither."""
    halves = [room(2, 1, "a"), room(2, 1, "b")]
    assert bundles(halves, {"CPU": 2}, 1) == [{"CPU": 2}, {"CPU": 2}, {"CPU": 2}]


def test_only_the_kinds_that_a_replica_needs_are_asked_for() -> None:
    nodes = [room(8, 2, GPU=0, memory=1e9), Room("b", {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 1})]
    assert bundles(nodes, {"GPU": 1.0}, 3) == [{"GPU": 4}, {"GPU": 1}, {"GPU": 1}]


def test_thirds_of_a_gpu_fit_three_times() -> None:
    assert fits({"GPU": 1.0}, {"GPU": 1 / 3}) == 3
    assert fits({"GPU": 0.9999999}, {"GPU": 0.1}) == 10
    assert fits({"CPU": 8}, {"GPU": 1}) == 0


ROOMS = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 8)).map(lambda p: room(p[0], min(p))), max_size=6
)


def holds(sizes: list[float], asked: list[float]) -> bool:
    """Say whether bundles of one kind fit on nodes of those sizes, by trying everything."""
    if not asked:
        return True
    first, *rest = asked
    places = {size for size in sizes if size >= first}
    return any(holds(_less(sizes, size, first), rest) for size in places)


def _less(sizes: list[float], size: float, amount: float) -> list[float]:
    left = list(sizes)
    left.remove(size)
    return [*left, size - amount]


@given(rooms=ROOMS, need=st.integers(1, 4), count=st.integers(1, 5), more=st.integers(0, 2))
def test_nodes_that_hold_the_total_have_the_room(
    rooms: list[Room], need: int, count: int, more: int
) -> None:
    """Whichever way the autoscaler packs it, and with whatever nodes it adds."""
    total = [bundle["CPU"] for bundle in bundles(rooms, {"CPU": need}, count)]
    sizes, free = [one.total["CPU"] for one in rooms], [one.free["CPU"] for one in rooms]
    added = [8.0] * more
    really = sum(amount // need for amount in free + added) >= count
    assert holds([*sizes, *added], sorted(total, reverse=True)) == really


@given(asked=st.integers(1, 1000), room=st.integers(0, 1000))
def test_a_refused_request_shrinks_to_what_there_is_in_a_few_rounds(asked: int, room: int) -> None:
    rounds = 0
    while asked > room:
        smaller = retreat(asked, room)
        assert room <= smaller < asked
        asked, rounds = smaller, rounds + 1
    assert rounds <= 10
    assert retreat(asked, room) < asked


def test_a_replica_is_written_as_ray_writes_it() -> None:
    assert parse_bundle("CPU=1, GPU=0.5") == {"CPU": 1.0, "GPU": 0.5}


@pytest.mark.parametrize("text", ["", "CPU", "CPU=", "CPU=x", "=1", "CPU=0", "GPU=-1", "CPU=inf"])
def test_what_is_no_resource_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bundle(text)
