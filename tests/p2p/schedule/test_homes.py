"""Every chunk has one home, and everybody has as many as the others."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from weightstream.p2p.schedule import Homes, late_start, standing

crowds = st.sets(st.text("abcdef0123456789", min_size=1, max_size=6), min_size=1, max_size=40)


@given(crowds, st.integers(0, 300))
def test_every_chunk_is_the_own_of_exactly_one_node(nodes: set[str], n_chunks: int) -> None:
    homes = Homes(standing("blob", nodes))
    owned = [chunk for node in nodes for chunk in homes.own(node, n_chunks)]
    assert sorted(owned) == list(range(n_chunks))


@given(crowds, st.integers(0, 300))
def test_homes_are_balanced_within_one(nodes: set[str], n_chunks: int) -> None:
    homes = Homes(standing("blob", nodes))
    counts = Counter(homes.home(chunk) for chunk in range(n_chunks))
    each = [counts[node] for node in nodes]
    assert max(each) - min(each) <= 1


@given(crowds, st.integers(0, 10_000))
def test_rank_begins_with_the_home_and_has_everybody_once(nodes: set[str], chunk: int) -> None:
    homes = Homes(standing("blob", nodes))
    rank = homes.rank(chunk)
    assert rank[0] == homes.home(chunk)
    assert sorted(rank) == sorted(nodes)
    assert tuple(homes.ranked(chunk)) == rank


@given(crowds)
def test_the_standing_does_not_depend_on_who_was_heard_of_first(nodes: set[str]) -> None:
    ordered = sorted(nodes)
    assert standing("blob", ordered) == standing("blob", reversed(ordered))
    assert standing("blob", [*ordered, *ordered]) == standing("blob", ordered)


def test_another_blob_has_another_order() -> None:
    nodes = [f"node{i}" for i in range(20)]
    assert standing("one", nodes) != standing("two", nodes)


def test_the_first_of_a_stripe_changes_from_stripe_to_stripe() -> None:
    homes = Homes(tuple("abcdefgh"))
    assert len({homes.home(stripe * 8) for stripe in range(8)}) == 8


def test_a_late_node_is_home_of_nothing() -> None:
    order = standing("blob", ["a", "b", "late"])
    homes = Homes(order, tuple(64 if node == "late" else 0 for node in order))
    assert homes.own("late", 64) == ()
    assert len(homes.own("a", 64)) == 32


def test_a_node_that_begins_in_the_middle_is_home_from_there_on() -> None:
    order = standing("blob", ["a", "late"])
    homes = Homes(order, tuple(10 if node == "late" else 0 for node in order))
    own = homes.own("late", 40)
    assert min(own) >= 10
    assert len(own) == 15


def test_late_starts_rise() -> None:
    assert late_start([0, 0], 64) == 64
    assert late_start([0, 64, 65], 64) == 66
    assert late_start([], 64) == 64


def test_the_chunks_of_one_node_have_many_stand_ins() -> None:
    homes = Homes(tuple("abcdefgh"))
    seconds = Counter(homes.rank(chunk)[1] for chunk in homes.own("c", 560))
    assert seconds == dict.fromkeys("abdefgh", 10)
