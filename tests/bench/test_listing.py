"""The static listings say what an S3 server would, for every query that clients send."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from weightstream.bench.listing import Entry, listing_xml, listings, query_pattern, scan

ENTRIES = (
    Entry("llama/config.json", 10, 1_700_000_000),
    Entry("llama/model-1.safetensors", 4096, 1_700_000_001),
    Entry("other", 1, 1_700_000_002),
)
NS = {"s3": "http://s3.amazonaws.com/doc/2006-03-01/"}


def texts(xml: str, path: str) -> list[str | None]:
    return [found.text for found in ElementTree.fromstring(xml).findall(path, NS)]


def test_prefix_without_delimiter_lists_everything_below() -> None:
    xml = listing_xml("b", ENTRIES, "llama/", "")
    assert texts(xml, "s3:Contents/s3:Key") == ["llama/config.json", "llama/model-1.safetensors"]
    assert texts(xml, "s3:Contents/s3:Size") == ["10", "4096"]
    assert texts(xml, "s3:KeyCount") == ["2"]


def test_delimiter_folds_folders() -> None:
    xml = listing_xml("b", ENTRIES, "", "/")
    assert texts(xml, "s3:Contents/s3:Key") == ["other"]
    assert texts(xml, "s3:CommonPrefixes/s3:Prefix") == ["llama/"]


def test_etag_is_nginx_s() -> None:
    assert texts(listing_xml("b", ENTRIES, "other", ""), "s3:Contents/s3:ETag") == ['"6553f102-1"']


def test_names_are_escaped() -> None:
    odd = (Entry("a&<b>", 1, 0),)
    assert texts(listing_xml("b", odd, "", ""), "s3:Contents/s3:Key") == ["a&<b>"]


def test_every_folder_and_key_has_an_answer() -> None:
    prefixes = {answer.prefix for answer in listings("b", ENTRIES)}
    assert {"", "llama", "llama/", "llama/config.json", "other"} <= prefixes


def test_keys_can_be_left_out() -> None:
    prefixes = {answer.prefix for answer in listings("b", ENTRIES, keys=False)}
    assert prefixes == {"", "llama", "llama/"}


def test_answers_hold_what_begins_with_their_prefix_in_utf_8_order() -> None:
    entries = tuple(Entry(key, 1, 0) for key in ("a/b", "a0", "aé/c", "b"))
    answers = {
        (answer.prefix, answer.delimiter): texts(answer.body, "s3:Contents/s3:Key")
        for answer in listings("b", entries)
    }
    assert answers["a", ""] == ["a/b", "a0", "aé/c"]
    assert answers["aé/", "/"] == ["aé/c"]
    assert answers["", "/"] == ["a0", "b"]


@pytest.mark.parametrize("query", ["llama%2Fmodel-1.safetensors", "llama/model-1.safetensors"])
def test_pattern_matches_both_spellings(query: str) -> None:
    assert re.fullmatch(query_pattern("llama/model-1.safetensors"), query)


def test_pattern_is_not_a_wildcard() -> None:
    assert not re.fullmatch(query_pattern("a.b"), "axb")


def test_scan_sorts_by_key(tmp_path: Path) -> None:
    for name in ("b", "a/c"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"1")
    assert [entry.key for entry in scan(tmp_path)] == ["a/c", "b"]
