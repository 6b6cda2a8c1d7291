"""Whom a node asks for a chunk to take over."""

from weightstream.p2p.schedule import Homes, View, acting_home, givers

HOMES = Homes(("a", "b", "c", "d"))


def everybody(node: str) -> bool:
    return True


def test_the_home_of_most_that_is_lacking_is_asked_first() -> None:
    lacking = [*HOMES.own("c", 12), HOMES.own("b", 12)[0]]
    assert givers(View("a", HOMES), lacking, everybody) == ("c", "b")


def test_nobody_asks_itself_or_who_is_down_or_has_nothing() -> None:
    view = View("a", HOMES, down=frozenset({"b"}))
    assert givers(view, range(12), lambda node: node != "c") == ("d",)


def test_who_stands_in_for_a_dead_home_is_asked_for_its_chunks() -> None:
    view = View("a", HOMES, down=frozenset({"b"}))
    lacking = HOMES.own("b", 48)
    stand_ins = {acting_home(view, chunk) for chunk in lacking}
    assert stand_ins == {"a", "c", "d"}, "they take turns"
    assert set(givers(view, lacking, everybody)) == {"c", "d"}


def test_a_slow_home_is_asked() -> None:
    view = View("a", HOMES, slow=frozenset({"b", "c", "d"}))
    assert set(givers(view, range(12), everybody)) == {"b", "c", "d"}


def test_what_was_taken_already_is_not_its_homes_to_give() -> None:
    moved = dict.fromkeys(HOMES.own("b", 12), "c")
    assert "b" not in givers(View("a", HOMES, moved=moved), range(12), everybody)


def test_nothing_lacking_asks_nobody() -> None:
    assert givers(View("a", HOMES), (), everybody) == ()
