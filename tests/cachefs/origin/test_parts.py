"""URLs, addresses and proxies: the pure parts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightstream.cachefs.origin.addresses import Address, AddressBook, in_turn
from weightstream.cachefs.origin.proxies import choose_proxy, environment_proxy, parse_proxy
from weightstream.cachefs.origin.urls import Url, shown
from weightstream.errors import UsageError

ADDRESSES = tuple(Address(2, (f"10.0.0.{i}", 80)) for i in range(3))


def test_url_parts() -> None:
    url = Url.parse("https://user:pass@[::1]:8443/a%20b?x=1")
    assert (url.host, url.port, url.target) == ("::1", 8443, "/a%20b?x=1")
    assert url.netloc == "[::1]:8443"
    assert str(url) == "https://[::1]:8443/a%20b?x=1"


@pytest.mark.parametrize("text", ["ftp://x/y", "http://", "http://h:99999/", "x"])
def test_bad_urls(text: str) -> None:
    with pytest.raises(UsageError):
        Url.parse(text)


def test_redirects_are_relative_to_the_request() -> None:
    assert str(Url.parse("http://h/a/b").join("../c?q=1")) == "http://h/c?q=1"
    assert str(Url.parse("http://h/a").join("https://k/d")) == "https://k/d"


@pytest.mark.parametrize(
    "secret",
    [
        "https://u:hunter2@h/f",
        "https://h/f?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2",
        "https://h/f?sv=2022&sig=hunter2",
        "https://h/f?token=hunter2",
        "https://h/f?AWSAccessKeyId=hunter2&Signature=hunter2&Expires=1",
    ],
)
def test_no_secret_is_shown(secret: str) -> None:
    assert shown(secret) == "https://h/f"


def test_a_query_that_names_the_file_is_kept() -> None:
    assert shown("https://h/get?file=a&sig=x") == "https://h/get?file=a"


@given(st.integers(0, 10), st.sets(st.sampled_from(ADDRESSES)))
def test_every_address_is_tried_and_dead_ones_last(turn: int, dead: set[Address]) -> None:
    order = in_turn(ADDRESSES, turn, dict.fromkeys(dead, 2.0), now_s=1.0)
    assert sorted(order, key=str) == sorted(ADDRESSES, key=str)
    assert set(order[len(order) - len(dead) :]) == dead
    assert in_turn(ADDRESSES, turn, dict.fromkeys(dead, 0.5), 1.0) == in_turn(
        ADDRESSES, turn, {}, 1.0
    )


def test_addresses_go_round_and_a_dead_one_is_skipped() -> None:
    book = AddressBook(lambda host, port: ADDRESSES)
    firsts = {book.candidates("h", 80)[0] for _ in range(3)}
    assert firsts == set(ADDRESSES)
    book.report(ADDRESSES[0], alive=False)
    assert ADDRESSES[0] not in {book.candidates("h", 80)[0] for _ in range(6)}
    book.report(ADDRESSES[0], alive=True)
    assert ADDRESSES[0] in {book.candidates("h", 80)[0] for _ in range(6)}


def test_proxy_urls() -> None:
    proxy = parse_proxy("http://me:p%40ss@proxy:3128")
    assert (proxy.host, proxy.port) == ("proxy", 3128)
    assert proxy.authorization == "Basic bWU6cEBzcw=="
    assert "bWU6" not in repr(proxy)
    assert parse_proxy("proxy:3128").authorization is None
    with pytest.raises(UsageError) as caught:
        parse_proxy("socks5://me:hunter2@proxy")
    assert "hunter2" not in str(caught.value)


def test_proxy_choice() -> None:
    url = Url.parse("https://h/x")
    assert choose_proxy(url, {"http": "http://p:1"}, False) is None
    assert choose_proxy(url, {"https": "http://p:1"}, True) is None
    assert choose_proxy(url, {"all": "http://p:1"}, False) == parse_proxy("p:1")


def test_environment_proxies_honour_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://p:1")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert environment_proxy(Url.parse("https://outside.example/x")) == parse_proxy("p:1")
    assert environment_proxy(Url.parse("https://inside.example/x")) is None
