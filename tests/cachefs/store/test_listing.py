"""Stored listings: exactly what was saved, or nothing."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cachefs.store.blobs import make_blob, open_store

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.store import StoredListing

URI = "s3://bucket/model"
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
GOOD = {"format": 1, "uri": URI, "fetched_at_s": 1.5, "blobs": [["s3://bucket/model/x", 3, "v"]]}


@given(uri=text, blobs=st.lists(st.builds(Blob, text, st.integers(0, 1 << 60), text)))
def test_a_listing_comes_back_as_it_was_saved(
    tmp_path_factory: pytest.TempPathFactory, uri: str, blobs: list[Blob]
) -> None:
    with open_store(tmp_path_factory.getbasetemp() / "listings") as store:
        before_s = time.time()
        store.save_listing(uri, tuple(blobs))
        listing = store.load_listing(uri)
        assert isinstance(listing, StoredListing)
        assert (listing.uri, listing.blobs) == (uri, tuple(blobs))
        assert before_s <= listing.fetched_at_s <= time.time()


def test_an_unknown_uri_has_no_listing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.save_listing(URI, (make_blob(),))
        assert store.load_listing("s3://bucket/other") is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"uri": "s3://bucket/other"},
        {"uri": 7},
        {"fetched_at_s": "now"},
        {"blobs": 7},
        {"blobs": [["x", 3]]},
        {"blobs": [["x", -3, "v"]]},
        {"blobs": [["x", True, "v"]]},
        {"blobs": [["x", 3.0, "v"]]},
        {"blobs": [[7, 3, "v"]]},
    ],
)
def test_a_listing_that_makes_no_sense_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    with open_store(tmp_path) as store:
        store.save_listing(URI, ())
        (path,) = (store.path / "listings").iterdir()
        path.write_text(json.dumps(GOOD))
        assert store.load_listing(URI) is not None
        path.write_text(json.dumps(GOOD | change))
        assert store.load_listing(URI) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"7", b"[" * 100_000])
def test_garbage_is_none(tmp_path: Path, content: bytes) -> None:
    with open_store(tmp_path) as store:
        store.save_listing(URI, ())
        (path,) = (store.path / "listings").iterdir()
        path.write_bytes(content)
        assert store.load_listing(URI) is None


def test_a_listing_is_replaced_whole(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.save_listing(URI, (make_blob(),) * 100)
        store.save_listing(URI, (make_blob(name="b"),))
        listing = store.load_listing(URI)
        assert listing is not None
        assert [blob.name for blob in listing.blobs] == ["b"]
        assert len(list((store.path / "listings").iterdir())) == 1
