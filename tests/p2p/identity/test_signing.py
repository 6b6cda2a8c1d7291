"""Signed requests: a virtual clock, real keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.p2p.identity.conftest import OTHER_SECRET, IdentityFactory

from weightstream.p2p.identity import Signer
from weightstream.p2p.identity.signing import WINDOW_S

KEY = bytes(range(32))


class Clock:
    """A wall clock that stands still."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.5

    def __call__(self) -> float:
        return self.now_s


def signers(most_nonces: int = 1000) -> tuple[Clock, Signer, Signer]:
    """Return a clock, who asks and who answers."""
    clock = Clock()
    return clock, Signer(KEY, "asks", clock), Signer(KEY, "answers", clock, most_nonces)


def test_a_signature_is_good_for_one_request() -> None:
    _, asks, answers = signers()
    header = asks.sign("GET", "/v1/hello")
    assert answers.refusal(header, "GET", "/v1/hello") is None
    assert answers.refusal(header, "GET", "/v1/hello") == "it came before (asks)"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/hello"), ("GET", "/v1/hell"), ("GET", "/v1/hello?x=1"), ("GET", "")],
)
def test_a_signature_is_good_for_nothing_else(method: str, path: str) -> None:
    _, asks, answers = signers()
    refusal = answers.refusal(asks.sign("GET", "/v1/hello"), method, path)
    assert refusal is not None
    assert "wrong" in refusal


@pytest.mark.parametrize("off_s", [-WINDOW_S - 1, WINDOW_S + 1, 86_400])
def test_an_expired_signature_is_refused(off_s: float) -> None:
    clock, asks, answers = signers()
    header = asks.sign("GET", "/")
    clock.now_s += off_s
    refusal = answers.refusal(header, "GET", "/")
    assert refusal is not None
    assert f"signed {abs(off_s)} s {'ago' if off_s > 0 else 'ahead'}" in refusal


@pytest.mark.parametrize("off_s", [-WINDOW_S + 1, WINDOW_S - 1])
def test_clocks_may_differ(off_s: float) -> None:
    clock, asks, answers = signers()
    header = asks.sign("GET", "/")
    clock.now_s += off_s
    assert answers.refusal(header, "GET", "/") is None
    assert answers.refusal(header, "GET", "/") is not None


def test_a_replay_is_refused_until_it_is_expired() -> None:
    clock, asks, answers = signers()
    clock.now_s += WINDOW_S - 1  # the clock of who asks is ahead: the nonce is good for longest
    header = asks.sign("GET", "/")
    clock.now_s -= WINDOW_S - 1
    assert answers.refusal(header, "GET", "/") is None
    for _ in range(2 * WINDOW_S + 10):
        clock.now_s += 1
        assert answers.refusal(header, "GET", "/") is not None
    assert answers.refusal(asks.sign("GET", "/"), "GET", "/") is None
    assert answers._seen._count == 1


def test_memory_is_bounded_and_no_replay_gets_in_by_it() -> None:
    clock, asks, answers = signers(most_nonces=50)
    headers = []
    for _ in range(40):
        clock.now_s += 0.5
        for _ in range(5):
            headers.append(asks.sign("GET", "/"))
            assert answers.refusal(headers[-1], "GET", "/") is None
    assert answers._seen._count <= 50
    assert sum(len(seen) for seen in answers._seen._by_second.values()) == answers._seen._count
    assert all(answers.refusal(header, "GET", "/") for header in headers)


def test_another_secret_is_refused(identity: IdentityFactory) -> None:
    one = identity("a", peer_encryption="off")
    two = identity("b", peer_encryption="off")
    other = identity("c", OTHER_SECRET, peer_encryption="off")
    assert two.refusal(one.sign("GET", "/"), "GET", "/") is None
    refusal = two.refusal(other.sign("GET", "/"), "GET", "/")
    assert refusal is not None
    assert other.node in refusal
    assert two.refusal(None, "GET", "/") == "it is not signed"


def test_nothing_is_signed_without_a_secret_or_under_tls(identity: IdentityFactory) -> None:
    for one in (identity("a", None, peer_encryption="off"), identity("b")):
        assert one.sign("GET", "/") is None
        assert one.refusal(None, "GET", "/") is None
        assert one.refusal("whatever", "GET", "/") is None


GOOD = Signer(KEY, "asks", Clock()).sign("GET", "/")


@given(
    header=st.text(max_size=600)
    | st.lists(st.sampled_from(GOOD.split(" ")), max_size=7).map(" ".join)
    | st.tuples(st.integers(0, len(GOOD) - 1), st.characters()).map(
        lambda edit: GOOD[: edit[0]] + edit[1] + GOOD[edit[0] + 1 :]
    )
)
def test_garbage_is_refused(header: str) -> None:
    _, _, answers = signers()
    refusal = answers.refusal(header, "GET", "/")
    same = header == GOOD or header.lower() == GOOD.lower()
    assert same or refusal is not None
    assert refusal is None or "\n" not in refusal
