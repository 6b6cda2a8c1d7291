"""Which nodes will get the next replicas: the guess, in all its cases."""

from hypothesis import given
from hypothesis import strategies as st

from weightstream.serve_integration.nodes import NodeRoom, pick_nodes

CPU = {"CPU": 1.0}


def room(name: str, cpus: float, held: int = 0, replicas: int = 0, idle: bool = False) -> NodeRoom:
    return NodeRoom(name, {"CPU": cpus, "GPU": 1.0}, held, replicas, idle)


def test_each_node_gets_one_before_any_gets_two() -> None:
    nodes = [room("a", 8), room("b", 2), room("c", 1)]
    assert set(pick_nodes(nodes, CPU, 3)) == {"a", "b", "c"}
    assert pick_nodes(nodes, CPU, 1) == ("a",)


def test_nodes_that_hold_the_weights_come_first() -> None:
    nodes = [room("a", 8), room("b", 2, held=5), room("c", 2, held=9)]
    assert pick_nodes(nodes, CPU, 1) == ("c",)
    assert set(pick_nodes(nodes, CPU, 2)) == {"b", "c"}


def test_nodes_without_replicas_come_before_those_with() -> None:
    assert pick_nodes([room("a", 8, replicas=2), room("b", 2)], CPU, 1) == ("b",)


def test_where_there_is_no_room_nobody_is_warmed() -> None:
    assert pick_nodes([room("a", 0.5)], CPU, 1) == ()
    assert pick_nodes([room("a", 8)], {"CPU": 1, "TPU": 1}, 1) == ()
    assert pick_nodes([room("a", 8)], {"TPU": 0.0}, 1) == ("a",)
    assert pick_nodes([], CPU, 3) == ()
    assert pick_nodes([room("a", 8)], CPU, 0) == ()


def test_a_fraction_that_just_fits_fits() -> None:
    thirds = NodeRoom("a", {"GPU": 1.0 - 2 * 0.3333})
    assert pick_nodes([thirds], {"GPU": 0.3333}, 1) == ("a",)
    assert pick_nodes([thirds], {"GPU": 0.34}, 1) == ()


def test_no_more_than_may_be_on_a_node() -> None:
    nodes = [room("a", 8, held=9, replicas=1), room("b", 8)]
    assert pick_nodes(nodes, CPU, 3, most_per_node=1) == ("b",)
    assert set(pick_nodes(nodes, CPU, 3, most_per_node=2)) == {"a", "b"}


def test_packing_fills_the_fullest_that_is_in_use() -> None:
    nodes = [room("a", 8), room("b", 2), room("c", 1, idle=True)]
    assert pick_nodes(nodes, CPU, 2, pack=True) == ("b",)
    assert set(pick_nodes(nodes, CPU, 3, pack=True)) == {"a", "b"}
    assert pick_nodes(nodes[2:], CPU, 1, pack=True) == ("c",)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 3)), max_size=6),
    st.integers(0, 12),
    st.booleans(),
    st.integers(0, 3),
)
def test_never_more_than_fit(
    given_nodes: list[tuple[int, int, int]], extra: int, pack: bool, most: int
) -> None:
    nodes = [room(str(i), cpus, held, n) for i, (cpus, held, n) in enumerate(given_nodes)]
    picked = pick_nodes(nodes, CPU, extra, pack=pack, most_per_node=most)
    assert len(set(picked)) == len(picked) <= extra
    able = {n.node_id for n in nodes if n.available["CPU"] >= 1 and (not most or n.replicas < most)}
    assert set(picked) <= able
    if extra >= sum(cpus for cpus, _, _ in given_nodes):
        assert set(picked) == able
