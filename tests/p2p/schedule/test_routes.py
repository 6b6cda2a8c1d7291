"""Whom a node asks: for every view, and for a crowd that shares one."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from weightstream.p2p.schedule import ORIGIN, Homes, View, acting_home, parent, route, standing

CHUNKS = st.integers(0, 500)


@st.composite
def views(draw: st.DrawFn, fan_outs: tuple[int | None, ...] = (None, 1, 2, 3, 4)) -> View:
    """Draw any view: with nodes that are down, slow, holders, or hold but do not read."""
    count = draw(st.integers(1, 30))
    nodes = [f"n{i}" for i in range(count)]
    known = [*nodes, "holder-a", "holder-b"]
    some = st.frozensets(st.sampled_from(known), max_size=count)
    me = draw(st.sampled_from([*nodes, "guest"]))
    return View(
        me,
        Homes(standing("blob", nodes)),
        draw(st.dictionaries(CHUNKS, some, max_size=5)),
        draw(some) - {me},
        draw(some),
        draw(st.dictionaries(st.sampled_from(known), st.sampled_from("xyz"))),
        draw(st.sampled_from(fan_outs)),
    )


def chunk_of(view: View, number: int) -> int:
    """Return a chunk that somebody holds, if there is one."""
    held = sorted(view.holders)
    return held[number % len(held)] if held and number % 2 else number


@given(views(), CHUNKS)
def test_a_route_has_the_origin_and_asks_nobody_twice(view: View, number: int) -> None:
    asks = route(view, chunk_of(view, number)).asks
    assert ORIGIN in asks
    assert len(set(asks)) == len(asks)


@given(views(), CHUNKS)
def test_a_route_never_asks_oneself_or_who_is_down(view: View, number: int) -> None:
    asks = route(view, chunk_of(view, number)).asks
    assert view.me not in asks
    assert not view.down.intersection(asks)


@given(views(), CHUNKS)
def test_slow_nodes_are_asked_after_the_origin_if_at_all(view: View, number: int) -> None:
    asks = route(view, chunk_of(view, number)).asks
    assert not view.slow.intersection(asks[: asks.index(ORIGIN)])


@given(views((None,)), CHUNKS)
def test_a_chunk_that_a_good_peer_has_is_not_read_from_the_origin(view: View, number: int) -> None:
    chunk = chunk_of(view, number)
    good = view.holders.get(chunk, frozenset()) - view.down - view.slow - {view.me}
    if good:
        assert route(view, chunk).asks[0] in good


@given(views((None,)), CHUNKS, st.integers(1, 5))
def test_who_joins_matters_only_for_what_nobody_has_started(
    view: View, number: int, joining: int
) -> None:
    """Holders are asked as before, whoever the home is now."""
    chunk = chunk_of(view, number)
    good = view.holders.get(chunk, frozenset()) - view.down - view.slow - {view.me}
    nodes = (*view.homes.order, *(f"new{i}" for i in range(joining)))
    later = replace(view, homes=Homes(standing("blob", nodes)))
    if good:
        assert route(later, chunk).asks[0] in good


@given(views(), CHUNKS)
def test_everybody_who_shares_a_view_ends_at_the_same_reader(view: View, chunk: int) -> None:
    """Follow first asks from every node: all come to one node, and that one reads the origin."""
    shared = replace(view, holders={})
    readers = set()
    for node in {*view.homes.order, view.me} - view.down - view.slow:
        steps, at = 0, node
        while not (found := route(replace(shared, me=at), chunk)).is_own:
            at, steps = found.asks[0], steps + 1
            assert steps <= len(view.homes.order)
        readers.add(at)
    standing_in = [n for n in view.homes.rank(chunk) if n not in view.down | view.slow]
    assert readers <= {standing_in[0]} if standing_in else len(readers) <= 1


@given(views((None,)), CHUNKS)
def test_holders_of_the_own_zone_come_first(view: View, number: int) -> None:
    chunk = chunk_of(view, number)
    good = view.holders.get(chunk, frozenset()) - view.down - view.slow - {view.me}
    zone = view.zones.get(view.me, "")
    near = {node for node in good if view.zones.get(node, "") == zone}
    first = route(view, chunk).asks[0]
    if near and view.homes.home(chunk) not in good:
        assert first in near


def test_a_member_that_only_holds_is_asked() -> None:
    view = View("a", Homes(("a", "b")), {0: frozenset({"c"}), 1: frozenset({"c"})})
    assert [route(view, chunk).asks[0] for chunk in (0, 1)] == ["c", "c"]


def test_a_peer_that_only_relays_is_named_as_such() -> None:
    nodes = standing("blob", [f"n{i}" for i in range(40)])
    homes = Homes(nodes)
    for me in nodes:
        found = route(View(me, homes, fan_out=3), 7)
        if found.is_own:
            assert me == homes.home(7)
        else:
            assert found.asks[0] == parent(homes, 7, me, 3)
            assert found.asks[0] in found.relays


def test_a_small_crowd_is_a_mesh_whatever_the_fan_out() -> None:
    homes = Homes(tuple("abcd"))
    for chunk in range(8):
        for me in "abcd":
            assert route(View(me, homes, fan_out=3), chunk) == route(View(me, homes), chunk)


def test_few_holders_of_a_large_crowd_are_not_asked_by_everybody() -> None:
    nodes = standing("blob", [f"n{i}" for i in range(100)])
    homes = Homes(nodes)
    holders = {0: frozenset({homes.home(0)})}
    asked = [route(View(me, homes, holders, fan_out=4), 0).asks[0] for me in nodes]
    assert asked.count(homes.home(0)) <= 4


def test_many_holders_share_what_joiners_ask() -> None:
    nodes = standing("blob", [f"n{i}" for i in range(40)])
    holders = {0: frozenset(nodes)}
    asked = [
        route(View(f"new{i}", Homes(nodes), holders, fan_out=4), 0).asks[0] for i in range(200)
    ]
    assert len(set(asked)) > 30


def chained(starts: dict[str, int], me: str, holders: dict[int, frozenset[str]]) -> View:
    """Return the view of one node of a crowd whose nodes came at different times."""
    order = standing("blob", starts)
    return View(me, Homes(order, tuple(starts[node] for node in order)), holders)


def test_who_comes_late_asks_who_came_just_before() -> None:
    starts = {"a": 0, "b": 100, "c": 101, "d": 102}
    asked = {me: route(chained(starts, me, {}), 7).asks[0] for me in starts}
    assert asked == {"a": ORIGIN, "b": "a", "c": "b", "d": "c"}
    assert route(chained(starts, "d", {}), 7).relays == {"b", "c"}


def test_who_comes_late_asks_who_came_just_before_though_others_have_it() -> None:
    starts = {"a": 0, "b": 100, "c": 101}
    found = route(chained(starts, "c", {7: frozenset({"a"})}), 7)
    assert found.asks[:2] == ("b", "a")


def test_of_those_who_come_together_one_asks_the_few_who_have_it() -> None:
    starts = {"warm": 0} | {f"n{i}": 100 for i in range(7)}
    holders = {chunk: frozenset({"warm"}) for chunk in range(70)}
    asked = [
        (me, route(chained(starts, me, holders), chunk).asks[0])
        for chunk in range(70)
        for me in starts
        if me != "warm"
    ]
    of_warm = [me for me, node in asked if node == "warm"]
    assert len(of_warm) == 70  # each chunk once
    assert {of_warm.count(me) for me in starts if me != "warm"} == {10}


def test_when_the_first_dies_the_next_to_have_come_reads_on() -> None:
    starts = {"a": 0, "b": 100, "c": 101, "d": 102}
    for me, asked in {"b": ORIGIN, "c": "b", "d": "c"}.items():
        view = replace(chained(starts, me, {}), down=frozenset({"a"}))
        assert route(view, 7).asks[0] == asked


@given(st.lists(st.sampled_from([0, 50, 100, 101]), min_size=1, max_size=12), CHUNKS, st.data())
def test_a_crowd_that_came_in_batches_ends_at_one_reader(
    begins: list[int], chunk: int, data: st.DataObject
) -> None:
    starts = {f"n{i}": begin for i, begin in enumerate(begins)}
    down = data.draw(st.frozensets(st.sampled_from(sorted(starts)), max_size=len(starts) - 1))
    readers = set()
    for at in starts.keys() - down:
        steps = 0
        while not (found := route(replace(chained(starts, at, {}), down=down), chunk)).is_own:
            at, steps = found.asks[0], steps + 1
            assert steps <= len(starts)
        readers.add(at)
    assert len(readers) == 1


@given(views(), CHUNKS)
def test_what_this_node_has_taken_over_it_reads_itself(view: View, number: int) -> None:
    assert route(replace(view, moved={number: view.me}), number).is_own


@given(views(), CHUNKS, st.sampled_from(["n0", "n1", "holder-a"]))
def test_who_has_taken_it_over_is_asked_before_all_others(
    view: View, number: int, taker: str
) -> None:
    asks = route(view, number).asks
    moved = route(replace(view, moved={number: taker}), number).asks
    if taker == view.me:
        return
    if taker in view.down:
        assert moved == asks
    else:
        assert moved == (taker, *(ask for ask in asks if ask != taker))


@given(views(fan_outs=(None,)), CHUNKS)
def test_who_reads_a_chunk_is_the_one_whose_route_begins_with_the_origin(
    view: View, chunk: int
) -> None:
    bare = replace(view, holders={}, slow=frozenset())
    own = [n for n in view.homes.order if n not in view.down or n == view.me]
    found = [n for n in own if route(replace(bare, me=n), chunk).is_own]
    assert found == [acting_home(bare, chunk)] or not own
