"""When the rest of a chunk is shared among those who wait for it, and who gives which block."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from weightstream.p2p.schedule import BLOCK_BYTES, block_giver, scattered

MIB = 1 << 20


def test_receivers_that_would_wait_long_share_the_rest() -> None:
    sent = dict.fromkeys("dcba", 2 * MIB)
    assert scattered(sent, 8 * MIB, 8 * MIB, 10 * MIB) == ("a", "b", "c", "d")


def test_a_fast_uplink_sends_to_everybody_itself() -> None:
    sent = dict.fromkeys("abcd", 2 * MIB)
    assert scattered(sent, 8 * MIB, 8 * MIB, 1000 * MIB) == ()


def test_two_receivers_have_nothing_to_share() -> None:
    assert scattered(dict.fromkeys("ab", 0), 64 * MIB, 64 * MIB, MIB) == ()


def test_who_has_nearly_all_of_it_is_left_in_peace() -> None:
    sent = {**dict.fromkeys("abcd", 0), "e": 8 * MIB - BLOCK_BYTES}
    assert scattered(sent, 8 * MIB, 8 * MIB, 10 * MIB) == ("a", "b", "c", "d")


def test_a_chunk_that_comes_from_the_origin_is_shared_when_receivers_are_behind_it() -> None:
    sent = dict.fromkeys("abcd", 2 * MIB)
    assert scattered(sent, 2 * MIB + BLOCK_BYTES, 8 * MIB, 10 * MIB) == ()
    assert scattered(sent, 2 * MIB + 2 * BLOCK_BYTES, 8 * MIB, 10 * MIB) == ("a", "b", "c", "d")


def test_nothing_is_known_before_anything_was_sent() -> None:
    assert scattered(dict.fromkeys("abcd", 0), 8 * MIB, 8 * MIB, 0.0) == ()


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 8 * MIB), min_size=1),
    st.integers(0, 8 * MIB),
    st.floats(1.0, 1e9),
)
def test_those_who_share_are_behind_and_gain_by_it(
    sent: dict[str, int], position: int, rate: float
) -> None:
    receivers = scattered(sent, position, 8 * MIB, rate)
    left = [8 * MIB - sent[node] for node in receivers]
    assert not receivers or len(receivers) >= 3
    assert all(rest > BLOCK_BYTES for rest in left)
    assert not left or sum(left) / rate > 2 * max(left) / rate


def test_each_receiver_gives_as_many_blocks_as_the_next() -> None:
    givers = Counter(block_giver(("a", "b", "c"), block) for block in range(32))
    assert set(givers) == {"a", "b", "c"}
    assert max(givers.values()) - min(givers.values()) <= 1
