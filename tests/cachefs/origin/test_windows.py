"""How much may be on its way from an origin that other nodes read at the same time."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from tests.cachefs.origin.servers import Notes

from weightstream.cachefs.origin.receive import receive
from weightstream.cachefs.origin.windows import shared_window

KIB = 1 << 10
SEGMENT = 1448


def test_a_slow_stream_has_little_on_its_way() -> None:
    assert shared_window(3e6, 3e6, 0.0003, SEGMENT) == 64 * KIB
    assert shared_window(6e6, 6e6, 0.0003, SEGMENT) == pytest.approx(123_600, rel=0.01)


def test_a_stream_has_as_much_on_its_way_as_its_share_whatever_its_rate() -> None:
    rates = (3e6, 6e6, 12e6)
    assert len({shared_window(6e6, rate, 0.0003, SEGMENT) for rate in rates}) == 1


def test_a_share_that_is_far_from_the_rate_counts_up_to_twice_and_half_of_it() -> None:
    window = shared_window(0.0, 8e6, 0.005, SEGMENT)
    assert window is not None
    assert window >= 8e6 * (0.005 + 0.01), "the rate goes on behind a queue of 10 ms"
    assert shared_window(1e9, 1e6, 0.0003, SEGMENT) == 64 * KIB


def test_a_fast_stream_is_the_kernels() -> None:
    assert shared_window(50e6, 50e6, 0.0003, SEGMENT) is None


def test_a_window_holds_more_than_a_round_trip() -> None:
    for round_trip_s in (0.0001, 0.001, 0.01, 0.1):
        for rate in (1e5, 1e6, 10e6, 100e6):
            window = shared_window(rate, rate, round_trip_s, SEGMENT)
            assert window is None or window >= 2 * rate * round_trip_s


def test_a_window_holds_several_segments() -> None:
    assert shared_window(1e6, 1e6, 0.0, 8949) == 8 * 8949
    assert shared_window(1e6, 1e6, 0.0, 65483) is None, "the loopback device is left alone"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection with the segments of a network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
        with here, there:
            yield here, there


def received(here: socket.socket, there: socket.socket, shares: bool, pause_s: float) -> int:
    """Receive half a MiB that comes with pauses; return the buffer's size then."""
    piece, count = bytes(64 * KIB), 8

    def send() -> None:
        for _ in range(count):
            there.sendall(piece)
            time.sleep(pause_s)

    sender = threading.Thread(target=send)
    sender.start()
    into = memoryview(bytearray(count * len(piece)))
    share = (lambda: 1e6) if shares else (lambda: None)
    assert receive(here, into, 0, Notes(step_bytes=64 * KIB, share=share)) == len(into)
    sender.join()
    return here.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


@pytest.mark.parametrize(("shares", "is_bounded"), [(True, True), (False, False)])
def test_a_slow_stream_is_bounded_where_its_link_is_shared(
    shares: bool, is_bounded: bool, ends: tuple[socket.socket, socket.socket]
) -> None:
    assert (received(*ends, shares, 0.1) == 2 * 64 * KIB) is is_bounded


def test_a_kept_connection_is_wide_again_for_a_node_alone(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    bounded = received(*ends, True, 0.1)
    assert received(*ends, False, 0.0) >= 3 * bounded, "the most that may be asked for"


def test_a_stream_is_bounded_before_its_first_byte(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    here, there = ends
    here.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200 * KIB)
    there.sendall(b"x")
    before = here.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    assert receive(here, memoryview(bytearray(1)), 0, Notes(share=lambda: 0.0)) == 1
    assert here.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < before


def test_a_stream_that_is_the_last_is_wide_again_while_it_runs(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    shares = iter([1e6, 1e6])
    bounded = received(*ends, True, 0.1)
    here, there = ends
    piece, count = bytes(64 * KIB), 16

    def send() -> None:
        for _ in range(count):
            there.sendall(piece)
            time.sleep(0.06)

    sender = threading.Thread(target=send)
    sender.start()
    notes = Notes(step_bytes=64 * KIB, share=lambda: next(shares, None))
    assert receive(here, memoryview(bytearray(count * len(piece))), 0, notes) == count * len(piece)
    sender.join()
    assert here.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= 3 * bounded


def test_time_between_two_reads_is_not_the_streams(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    here, there = ends
    asked: list[float] = []

    def share() -> float:
        asked.append(time.monotonic())
        return 0.0

    size = 4 << 20
    sender = threading.Thread(target=there.sendall, args=(bytes(size),))
    sender.start()
    notes = Notes(step_bytes=256 * KIB, share=share)
    notes.on_advance = lambda count: time.sleep(0.05)
    assert receive(here, memoryview(bytearray(size)), 0, notes) == size
    sender.join()
    assert len(asked) == 1, "at the beginning: to wait for bytes never took a quarter of a second"
