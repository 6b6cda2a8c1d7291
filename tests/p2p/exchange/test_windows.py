"""How much may be on its way on one connection, and what may not come."""

import socket

import pytest

from weightstream.p2p.exchange.windows import BULK_BYTES, receive_window
from weightstream.p2p.exchange.wire import Channel, WireError

KIB = 1 << 10


def test_on_a_slow_link_what_waits_for_it_is_little() -> None:
    assert receive_window(25e6, 4, 0.0003, 1448) < 40 * KIB


def test_on_a_fast_link_windows_are_large() -> None:
    assert receive_window(1.25e9, 8, 0.0003, 1448) == BULK_BYTES


def test_windows_hold_more_than_a_round_trip() -> None:
    for round_trip_s in (0.0001, 0.001, 0.01, 0.1):
        for rate in (1e6, 25e6, 125e6):
            window = receive_window(rate, 8, round_trip_s, 1448)
            assert window == BULK_BYTES or 8 * window >= 2 * rate * round_trip_s


def test_a_window_is_never_so_small_that_a_rate_cannot_grow() -> None:
    assert receive_window(0, 0, 0.0, 1448) == 16 * KIB
    assert receive_window(1e6, 64, 0.0, 1448) == 16 * KIB


def test_a_window_holds_several_segments() -> None:
    assert receive_window(1e6, 64, 0.0, 8949) >= 4 * 8949
    assert receive_window(1e6, 64, 0.0, 65483) == BULK_BYTES


def test_a_channel_knows_its_round_trip() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            here.sendall(b"x")
            assert 0 < Channel(here).round_trip_s < 0.1
            assert Channel(here).segment_bytes > 16 * KIB
    left, right = socket.socketpair()
    with left, right:
        assert Channel(left).round_trip_s == 0
        assert Channel(left).segment_bytes == 0


@pytest.mark.parametrize("body", [b"[" * 60_000, b"nonsense", b"[]"])
def test_a_message_without_sense_breaks_the_rules(body: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        right.sendall(body)
        with pytest.raises(WireError):
            Channel(left).read_json(len(body))
