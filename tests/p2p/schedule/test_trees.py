"""Trees: bounded, balanced, and across a border once."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.p2p.schedule import Homes, ancestors, parent, standing


def crowd(count: int) -> Homes:
    return Homes(standing("blob", [f"n{i}" for i in range(count)]))


@given(st.integers(1, 120), st.integers(1, 6), st.integers(0, 1000), st.integers(1, 5))
def test_everybody_is_below_the_home(count: int, fan_out: int, chunk: int, zones: int) -> None:
    homes = crowd(count)
    zone_of = {node: str(i % zones) for i, node in enumerate(homes.order)}
    for node in homes.order:
        above = tuple(ancestors(homes, chunk, node, fan_out, zone_of))
        assert len(set(above)) == len(above) < count
        assert node not in above
        assert (above[-1] if above else node) == homes.home(chunk)


@given(st.integers(2, 120), st.integers(1, 6), st.integers(0, 1000), st.integers(1, 5))
def test_nobody_is_asked_by_more_than_the_fan_out(
    count: int, fan_out: int, chunk: int, zones: int
) -> None:
    """Of the own zone; the head of a zone is asked by as many heads of others besides."""
    homes = crowd(count)
    zone_of = {node: str(i % zones) for i, node in enumerate(homes.order)}
    near: Counter[str | None] = Counter()
    far: Counter[str | None] = Counter()
    for node in homes.order:
        above = parent(homes, chunk, node, fan_out, zone_of)
        if above is not None:
            (near if zone_of[above] == zone_of[node] else far)[above] += 1
    assert max(near.values(), default=0) <= fan_out
    assert max(far.values(), default=0) <= fan_out


@given(st.integers(2, 120), st.integers(1, 6), st.integers(0, 1000), st.integers(2, 5))
def test_a_chunk_enters_a_zone_once(count: int, fan_out: int, chunk: int, zones: int) -> None:
    homes = crowd(count)
    zone_of = {node: str(i % zones) for i, node in enumerate(homes.order)}
    entered: Counter[str] = Counter()
    for node in homes.order:
        above = parent(homes, chunk, node, fan_out, zone_of)
        if above is not None and zone_of[above] != zone_of[node]:
            entered[zone_of[node]] += 1
    home_zone = zone_of[homes.home(chunk)]
    assert entered == {zone: 1 for zone in set(zone_of.values()) - {home_zone}}


@pytest.mark.parametrize(("count", "fan_out"), [(32, 2), (100, 3), (100, 4), (257, 4)])
def test_everybody_passes_on_as_much_as_everybody_else(count: int, fan_out: int) -> None:
    """Over any `count` chunks a node sends about `count` copies: as many as it receives."""
    homes = crowd(count)
    sent = Counter(
        parent(homes, chunk, node, fan_out) for chunk in range(count) for node in homes.order
    )
    each = [sent[node] for node in homes.order]
    assert max(each) <= 1.3 * count
    assert min(each) >= 0.6 * count


@pytest.mark.parametrize("fan_out", [2, 3, 4])
def test_the_inner_nodes_of_chunks_in_turn_differ(fan_out: int) -> None:
    homes = crowd(96)
    inner = Counter(
        node
        for chunk in range(fan_out)
        for node in {parent(homes, chunk, node, fan_out) for node in homes.order} - {None}
    )
    assert sum(count > 1 for count in inner.values()) <= 2 * fan_out  # homes among them


def test_depth_grows_with_the_logarithm() -> None:
    homes = crowd(1000)
    deepest = max(len(tuple(ancestors(homes, 5, node, 4))) for node in homes.order)
    assert deepest <= 6


def test_a_node_outside_of_the_crowd_has_a_parent_of_its_zone() -> None:
    homes = crowd(30)
    zone_of = {node: str(i % 3) for i, node in enumerate(homes.order)} | {"guest": "2"}
    for chunk in range(20):
        above = tuple(ancestors(homes, chunk, "guest", 3, zone_of))
        assert zone_of[above[0]] == "2"
        assert above[-1] == homes.home(chunk)


def test_those_who_join_late_have_a_tree_of_their_own() -> None:
    order = standing("blob", [f"n{i}" for i in range(40)])
    late = set(order[::2])
    homes = Homes(order, tuple(100 if node in late else 0 for node in order))
    for chunk in range(10):
        entered = [node for node in late if parent(homes, chunk, node, 3) not in late]
        assert len(entered) == 1
        for node in order:
            above = tuple(ancestors(homes, chunk, node, 3))
            assert (above[-1] if above else node) == homes.home(chunk)
            assert node in late or not late.intersection(above)
