"""The lease, against a store that answers as Ray's does."""

from dataclasses import dataclass, field

import pytest

from weightstream.errors import ClusterError
from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import desk, ledger
from weightstream.serve_integration.compaction.ledger import Lease, State, leased


@dataclass
class Store:
    """Ray's key-value store, in memory."""

    values: dict[bytes, bytes] = field(default_factory=dict)

    def _internal_kv_put(
        self, key: str | bytes, value: str | bytes, overwrite: bool = True, *, namespace: str
    ) -> bool:
        there = _bytes(key) in self.values
        if overwrite or not there:
            self.values[_bytes(key)] = _bytes(value)
        return there

    def _internal_kv_get(self, key: str | bytes, *, namespace: str) -> bytes | None:
        return self.values.get(_bytes(key))

    def _internal_kv_list(self, prefix: str, *, namespace: str) -> list[bytes]:
        return [key for key in self.values if key.startswith(prefix.encode())]

    def _internal_kv_del(self, key: str | bytes, *, namespace: str) -> int:
        return int(self.values.pop(_bytes(key), None) is not None)


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


class Clock:
    now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock, store = Clock(), Store()
    monkeypatch.setattr(ledger, "time", clock)
    monkeypatch.setattr(desk, "time", clock)
    monkeypatch.setattr(ledger, "internal_kv", store)
    monkeypatch.setattr(registry, "internal_kv", store)
    return clock


def test_the_second_compactor_is_told_who_the_first_is(clock: Clock) -> None:
    with leased("first"):
        assert ledger.lease_holder() == "first"
        with pytest.raises(ClusterError, match="first compacts this cluster already; its lease"):
            Lease("second").take()
    assert ledger.lease_holder() == ""
    Lease("second").take()
    assert ledger.lease_holder() == "second"


def test_a_lease_whose_holder_died_ends_by_itself(clock: Clock) -> None:
    dead = Lease("dead")
    dead.take()
    clock.now += ledger.LEASE_S + 1
    heir = Lease("heir")
    heir.take()
    with pytest.raises(ClusterError, match="heir compacts this cluster"):
        dead.renew()
    heir.renew()


def test_one_that_woke_up_late_does_not_give_back_what_is_not_its_own(clock: Clock) -> None:
    with leased("late"):
        clock.now += ledger.LEASE_S + 1
        Lease("heir").take()
    assert ledger.lease_holder() == "heir"


def test_of_two_that_begin_at_once_one_is_refused(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = ledger._latest()
    Lease("first").take()
    monkeypatch.setattr(ledger, "_latest", lambda: seen)
    with pytest.raises(ClusterError, match="at the same moment"):
        Lease("second").take()


def test_a_state_is_what_was_written_and_grows_old(clock: Clock) -> None:
    written = State(
        "moving", "two", "n", (("n", "busy", "why"),), 1, "no", 2, {"a": 1}, 990.0, 1000.0
    )
    ledger.write_state(written)
    assert ledger.read_state() == written
    clock.now += ledger.FRESH_S
    assert ledger.read_state() is None


def test_a_state_that_holds_for_long_does_not_grow_old(clock: Clock) -> None:
    """A move takes minutes, in which nothing changes: whoever reads must not miss the plug-in."""
    sitting = desk.Desk(lambda uris: {})
    sitting.show(State("moving", "two", "n", at=clock.now, heard=clock.now))
    for _ in range(100):
        sitting.turn()
        clock.now += 1
    state = ledger.read_state()
    assert state is not None
    assert (state.phase, state.at) == ("moving", 1000.0)
    assert state.heard > clock.now - 7


def test_a_state_of_another_version_is_none(clock: Clock) -> None:
    registry.note("compaction/state", {"phase": "moving", "mood": "good"})
    assert ledger.read_state() is None


def test_hurry_ends(clock: Clock) -> None:
    ledger.hurry(5)
    assert ledger.is_hurried()
    clock.now += 5
    assert not ledger.is_hurried()
