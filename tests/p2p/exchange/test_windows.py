"""How much may be on its way on one connection."""

from weightstream.p2p.exchange.windows import BULK_BYTES, receive_window

KIB = 1 << 10


def test_who_sees_no_faults_has_large_windows() -> None:
    assert receive_window(25e6, 4, sees_faults=False) == BULK_BYTES


def test_on_a_slow_link_what_waits_for_it_is_little() -> None:
    assert receive_window(25e6, 4, sees_faults=True) < 32 * KIB


def test_on_a_fast_link_windows_do_not_limit_it() -> None:
    assert receive_window(1.25e9, 8, sees_faults=True) == BULK_BYTES


def test_a_window_is_never_so_small_that_a_rate_cannot_grow() -> None:
    assert receive_window(0, 0, sees_faults=True) == 16 * KIB
    assert receive_window(1e6, 64, sees_faults=True) == 16 * KIB
