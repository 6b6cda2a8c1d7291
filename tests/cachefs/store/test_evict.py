"""Eviction, pinning and removal: the policy alone, then on a store."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cachefs.store.blobs import CHUNK, content_of, fill, make_blob, open_store, store_blob
from tests.conftest import LogWatch

from weightstream.cachefs.store.evict import Limits, Space, choose_victims, room_bytes
from weightstream.cachefs.store.info import is_under


@dataclass(frozen=True)
class Item:
    allocated_bytes: int
    last_used_s: float
    pinned: bool = False
    in_use: bool = False


items = st.builds(Item, st.integers(0, 100), st.floats(0, 100), st.booleans(), st.booleans())


@given(
    blobs=st.lists(items, max_size=12),
    free=st.integers(0, 500),
    limits=st.builds(Limits, st.integers(0, 500), st.integers(0, 500)),
    needed=st.integers(0, 300),
)
def test_policy_takes_the_oldest_and_no_more_than_needed(
    blobs: list[Item], free: int, limits: Limits, needed: int
) -> None:
    used = sum(blob.allocated_bytes for blob in blobs)
    victims = choose_victims(blobs, Space(used, free), limits, needed)
    freed = sum(blob.allocated_bytes for blob in victims)
    kept = [b for b in blobs if not any(b is v for v in victims)]
    assert not any(blob.pinned or blob.in_use for blob in victims)
    oldest_kept = min(
        (b.last_used_s for b in kept if not (b.pinned or b.in_use)), default=float("inf")
    )
    assert all(blob.last_used_s <= oldest_kept for blob in victims)
    if oldest_kept < float("inf"):  # something could still go, so there is enough room
        assert room_bytes(Space(used - freed, free + freed), limits) >= needed
    if victims:  # and without the last one there was not
        less = freed - victims[-1].allocated_bytes
        assert room_bytes(Space(used - less, free + less), limits) < needed


def test_no_limit_but_free_space() -> None:
    assert room_bytes(Space(10**12, 100), Limits(0, 40)) == 60
    assert room_bytes(Space(90, 100), Limits(100, 40)) == 10


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    for name in names:
        store_blob(tmp_path, make_blob(name=name))
    with open_store(tmp_path, store_max_bytes=5 * CHUNK * 3) as store:
        one = store.usage_bytes() // 3
        store.open_blob(make_blob(name="a")).close()
        assert store.evict(5 * CHUNK * 3 - store.usage_bytes()) == []
        removed = store.evict(5 * CHUNK * 3 - 2 * one)
        assert [info.blob.name for info in removed] == ["b"]
        assert store.usage_bytes() == 2 * one
        assert sorted(info.blob.name for info in store.blobs()) == ["a", "c"]
        assert store.stats().evicted_blobs == 1
        assert store.stats().evicted_bytes == one


def test_pinned_and_used_blobs_stay(tmp_path: Path) -> None:
    for name in "abc":
        store_blob(tmp_path, make_blob(name=name))
    with open_store(tmp_path, store_max_bytes=1) as store, open_store(tmp_path) as other:
        assert other.pin("s3://bucket/model/a") == 1
        with other.open_blob(make_blob(name="b")):
            assert {(i.blob.name, i.pinned, i.in_use) for i in store.blobs()} == {
                ("a", True, False),
                ("b", False, True),
                ("c", False, False),
            }
            assert [info.blob.name for info in store.evict()] == ["c"]
        assert [info.blob.name for info in store.evict()] == ["b"]
        assert store.pin("s3://bucket", pinned=False) == 1
        assert [info.blob.name for info in store.evict()] == ["a"]
        assert store.usage_bytes() == 0


def test_the_free_space_limit_counts_too(tmp_path: Path) -> None:
    store_blob(tmp_path, make_blob())
    with open_store(tmp_path, store_min_free_bytes=1 << 60) as store:
        assert store.room_bytes() < 0
        assert len(store.evict()) == 1


def test_what_is_mapped_survives_eviction(tmp_path: Path) -> None:
    store_blob(tmp_path, make_blob())
    with open_store(tmp_path, store_max_bytes=1) as store:
        with store.open_blob(make_blob()) as stored:
            mapped = stored.map()
        assert len(store.evict()) == 1
        assert mapped[:] == content_of(make_blob())
        with store.open_blob(make_blob()) as stored:
            assert stored.states() == bytes(5)
            fill(stored)


def test_remove_takes_what_is_below_a_uri_and_not_in_use(
    tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log("s3://bucket/model/a stays in the store: it is in use")
    for name in ("a", "a-b", "a/c"):
        store_blob(tmp_path, make_blob(name=name))
    with open_store(tmp_path) as store, store.open_blob(make_blob(name="a")):
        removed = store.remove("s3://bucket/model/a/")
        assert [info.blob.uri for info in removed] == ["s3://bucket/model/a/c"]
        assert len(list(store.blobs())) == 2


@pytest.mark.parametrize(
    ("uri", "prefix", "under"),
    [
        ("s3://b/m/x", "s3://b/m", True),
        ("s3://b/m/x", "s3://b/m/", True),
        ("s3://b/m/x", "s3://b/m/x", True),
        ("s3://b/m/x", "", True),
        ("s3://b/m70/x", "s3://b/m7", False),
        ("s3://b/m", "s3://b/m/x", False),
    ],
)
def test_prefixes_are_whole_components(uri: str, prefix: str, under: bool) -> None:
    assert is_under(uri, prefix) is under


def test_info_tells_what_is_stored(tmp_path: Path) -> None:
    before_s = time.time()
    store_blob(tmp_path, make_blob())
    with open_store(tmp_path) as store:
        (info,) = store.blobs()
        assert info.blob == make_blob()
        assert (info.present_bytes, info.durable_chunks, info.n_chunks) == (info.blob.size, 5, 5)
        assert (info.complete, info.in_use, info.pinned) == (True, False, False)
        assert before_s <= info.last_used_s <= time.time()
        assert info.allocated_bytes == store.usage_bytes() >= info.blob.size
