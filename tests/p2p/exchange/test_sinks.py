"""When the bytes of a peer are not waited for, by a clock that the test turns."""

import pytest

from weightstream.cachefs.blob import Blob, Extent
from weightstream.p2p.exchange import sinks
from weightstream.p2p.exchange.flights import Flight
from weightstream.p2p.exchange.sinks import FlightSink, SlowError, WrongError

MIB = 1 << 20
BLOB = Blob("s3://models/w.bin", 8 * MIB, "v1")


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Known:
    """What is known of peers: nothing bad but what the test says."""

    def __init__(self) -> None:
        self.slow = self.banned = False

    def is_slow(self, node: str, times: float) -> bool:
        return self.slow

    def dawdles(self, node: str) -> bool:
        return False

    def is_banned(self, node: str) -> bool:
        return self.banned


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(sinks, "time", made)
    return made


def seconds_of(rate_bytes_s: int, clock: Clock, urgent: bool) -> float | None:
    """Return after how long a peer that sends at a rate is given up; None when it may finish."""
    flight = Flight(BLOB, 0, Extent(0, BLOB.size))
    flight.urgent = urgent
    sink = FlightSink(flight, "peer", "me", Known())
    begun_s = clock.now_s
    while flight.position < BLOB.size:
        try:
            sink.advance(min(rate_bytes_s // 8, BLOB.size - flight.position))
        except SlowError:
            return clock.now_s - begun_s
        clock.now_s += 0.125
    return None


@pytest.mark.parametrize(("urgent", "longest_s"), [(True, 2.5), (False, 5.5)])
def test_a_peer_that_would_not_be_done_in_time_is_given_up_early(
    clock: Clock, urgent: bool, longest_s: float
) -> None:
    given_up_s = seconds_of(64 << 10, clock, urgent)  # two minutes for the chunk
    assert given_up_s is not None
    assert longest_s - 1 < given_up_s < longest_s


@pytest.mark.parametrize("urgent", [True, False])
def test_a_peer_that_is_merely_slow_may_finish(clock: Clock, urgent: bool) -> None:
    assert seconds_of(512 << 10, clock, urgent) is None  # 16 s


def test_a_peer_that_waits_itself_is_not_judged_by_what_it_did_not_send_yet(clock: Clock) -> None:
    flight = Flight(BLOB, 0, Extent(0, BLOB.size))
    sink = FlightSink(flight, "peer", "me", Known())
    for second in range(20):
        clock.now_s += 1
        sink.waiting((), second)
    sink.advance(1 * MIB)
    assert flight.position == 1 * MIB


def test_what_a_peer_is_sending_when_another_of_its_chunks_is_found_wrong_is_broken_off(
    clock: Clock,
) -> None:
    known = Known()
    sink = FlightSink(Flight(BLOB, 0, Extent(0, BLOB.size)), "peer", "me", known)
    sink.advance(1 * MIB)
    known.banned = True
    with pytest.raises(WrongError, match="peer peer gave wrong bytes"):
        sink.advance(1 * MIB)


def test_a_slow_peer_is_left_unless_it_is_the_last_that_has_it(clock: Clock) -> None:
    known = Known()
    known.slow = True
    sinks_of = [
        FlightSink(Flight(BLOB, 0, Extent(0, BLOB.size)), "peer", "me", known, is_last)
        for is_last in (False, True)
    ]
    clock.now_s += 2
    with pytest.raises(SlowError):
        sinks_of[0].advance(1 * MIB)
    sinks_of[1].advance(1 * MIB)
