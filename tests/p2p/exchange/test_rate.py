"""How fast something grows that only counts."""

import time

import pytest

from weightstream.p2p.exchange.rate import Rate


def test_the_rate_is_that_of_the_last_half_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now_s": 100.0, "count": 0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now_s"])
    rate = Rate(lambda: int(clock["count"]))
    assert rate.bytes_s() == 0.0
    found = []
    for step in (100, 100, 100, 900, 900, 900):
        clock["now_s"] += 0.25
        clock["count"] += step
        found.append(rate.bytes_s())
    assert found[1] == 400.0
    assert found[-1] == 3600.0


def test_a_pause_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now_s": 100.0, "count": 0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now_s"])
    rate = Rate(lambda: int(clock["count"]))
    rate.bytes_s()
    clock["now_s"] += 60.0
    assert rate.bytes_s() == 0.0
    clock["now_s"] += 0.5
    clock["count"] += 1000
    assert rate.bytes_s() == 2000.0
