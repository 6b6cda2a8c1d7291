"""Which files are the model, what an index may say, and what a plan refuses. Pure."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.loader.attacks.corpus import entry, file

from weightstream.cachefs.blob import Blob, Extent
from weightstream.errors import FormatError, NotFoundError, UsageError
from weightstream.loader.headers import read_header
from weightstream.loader.index import Index, check_index_size, parse_index
from weightstream.loader.model import ModelFiles, choose_files, model_root, select_shards
from weightstream.loader.plan import (
    GAP_BYTES,
    Shard,
    holders,
    make_plan,
    natural_order,
    wanted_extents,
    without,
)

ROOT = "s3://b/m"
TWO = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def choose(*names: str, uri: str = ROOT) -> ModelFiles:
    return choose_files(uri, [Blob(f"{ROOT}/{name}", 1, "v") for name in names])


def shard_names(files: ModelFiles) -> list[str]:
    return [blob.name for blob in files.shards]


def index_of(weight_map: object) -> Index:
    body = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return parse_index(Blob(f"{ROOT}/{INDEX}", len(body), "v"), body)


def shard(name: str, *tensors: str) -> Shard:
    entries = {t: entry(4 * i, 4 * i + 4) for i, t in enumerate(tensors)}
    data = file(entries, bytes(4 * len(tensors)))
    blob = Blob(f"{ROOT}/{name}", len(data), "v")
    return Shard(blob, read_header(blob, lambda e: data[e.start : e.stop]))


def test_a_single_file_may_be_named_itself() -> None:
    blob = Blob(f"{ROOT}/x.safetensors", 1, "v")
    assert choose_files(f"{ROOT}/x.safetensors", [blob]).shards == (blob,)


def test_listing_takes_the_safetensors_directly_under_the_prefix() -> None:
    files = choose("README.md", "config.json", "sub/other.safetensors", *TWO)
    assert shard_names(files) == TWO
    assert files.index is None


def test_consolidated_files_that_repeat_the_shards_are_left_out() -> None:
    assert shard_names(choose("consolidated.safetensors", *TWO)) == TWO
    alone = choose("consolidated.safetensors")
    assert shard_names(alone) == ["consolidated.safetensors"]


def test_the_index_is_found_and_decides() -> None:
    files = choose(INDEX, *TWO, "extra.safetensors")
    assert files.index is not None
    selected = select_shards(files, index_of({"a": TWO[1], "b": TWO[0]}))
    assert [blob.name for blob in selected] == TWO


def test_an_index_may_be_named_itself_and_stands_for_its_folder() -> None:
    uri = f"{ROOT}/other.safetensors.index.json"
    assert model_root(uri) == ROOT
    files = choose(INDEX, "other.safetensors.index.json", *TWO, uri=uri)
    assert files.index is not None
    assert files.index.name == "other.safetensors.index.json"
    with pytest.raises(NotFoundError, match="no such index"):
        choose(*TWO, uri=uri)


def test_several_indexes_need_a_name_unless_one_is_the_usual() -> None:
    two = ("a.safetensors.index.json", "b.safetensors.index.json")
    with pytest.raises(UsageError, match=r"several indexes.*a\.safetensors"):
        choose(*two, *TWO)
    chosen = choose(INDEX, *two, *TWO).index
    assert chosen is not None
    assert chosen.name == INDEX


def test_no_weights_is_said_with_where_they_might_be() -> None:
    with pytest.raises(NotFoundError, match=r"no \*\.safetensors among its 1 files"):
        choose("config.json")
    with pytest.raises(NotFoundError, match="some are in unet, vae"):
        choose("vae/x.safetensors", "unet/x.safetensors")


def test_a_missing_number_among_the_shards_is_seen_without_an_index() -> None:
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.safetensors is missing"):
        choose("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")


def test_an_index_that_names_a_missing_shard_is_refused() -> None:
    index = index_of({"a": TWO[0], "b": "model-00009-of-00009.safetensors"})
    with pytest.raises(FormatError, match=f"{INDEX}: index names 'model-00009.*not there"):
        select_shards(choose(INDEX, *TWO), index)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "s3://x/y", ".."])
def test_an_index_never_reaches_outside_the_listing(file: str) -> None:
    with pytest.raises(FormatError, match="which is not there"):
        select_shards(choose(INDEX, *TWO), index_of({"a": file}))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not an object"),
        (b"\xff", "not valid JSON"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "not a file name"),
        (b'{"weight_map": {"a": ""}}', "not a file name"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "duplicate name 'a'"),
        (b'{"weight_map": ' + b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_index_is_refused(body: bytes, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        parse_index(Blob(f"{ROOT}/{INDEX}", len(body), "v"), body)


def test_an_index_of_a_gigabyte_is_not_even_fetched() -> None:
    with pytest.raises(FormatError, match="exceed the limit"):
        check_index_size(Blob(f"{ROOT}/{INDEX}", 1 << 30, "v"))


def test_a_tensor_that_the_shard_lacks_is_named() -> None:
    with pytest.raises(FormatError, match=f"tensor 'b' in '{TWO[0]}', which does not have it"):
        make_plan([shard(TWO[0], "a")], index_of({"a": TWO[0], "b": TWO[0]}), None)


def test_the_index_decides_between_two_homes_of_one_tensor() -> None:
    shards = [shard(TWO[0], "a", "b"), shard(TWO[1], "b")]
    plan = make_plan(shards, index_of({"a": TWO[0], "b": TWO[1]}), None)
    assert [(p.name, p.blob.name) for p in plan.places] == [("a", TWO[0]), ("b", TWO[1])]


def test_without_an_index_one_tensor_in_two_files_is_refused() -> None:
    with pytest.raises(FormatError, match="tensor 'b' is in model-00001-of-00002"):
        make_plan([shard(TWO[0], "a", "b"), shard(TWO[1], "b")], None, None)


def test_tensors_that_the_index_does_not_name_are_kept() -> None:
    plan = make_plan([shard(TWO[0], "a", "b")], index_of({"a": TWO[0]}), None)
    assert [p.name for p in plan.places] == ["a", "b"]


def test_unknown_names_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no tensor 'x', 'y'"):
        make_plan([shard(TWO[0], "a")], None, frozenset({"a", "y", "x"}))
    blobs = [shard(name, "a").blob for name in TWO]
    with pytest.raises(UsageError, match="no tensor 'x'"):
        holders(blobs, index_of({"a": TWO[0]}), frozenset({"x"}))


def test_only_the_shards_that_hold_wanted_names_are_opened() -> None:
    blobs = [shard(name, "a").blob for name in TWO]
    index = index_of({"a": TWO[0], "b": TWO[1]})
    assert holders(blobs, index, frozenset({"b"})) == (blobs[1],)
    assert holders(blobs, index, None) == tuple(blobs)


@pytest.mark.parametrize(("gap", "ranges"), [(0, 1), (GAP_BYTES, 1), (GAP_BYTES + 1, 2)])
def test_extents_closer_than_the_gap_are_fetched_as_one(gap: int, ranges: int) -> None:
    sizes = {"a": 4, "gap": gap, "b": 4}
    at, entries = 0, {}
    for name, size in sizes.items():
        entries[name] = entry(at, at + size, "U8", [size])
        at += size
    data = file(entries, bytes(at))
    blob = Blob(f"{ROOT}/x", len(data), "v")
    one = Shard(blob, read_header(blob, lambda e: data[e.start : e.stop]))
    places = make_plan([one], None, frozenset({"a", "b"})).places
    assert len(wanted_extents(places)) == ranges


def test_known_bytes_are_not_fetched_again() -> None:
    left = without([Extent(0, 10), Extent(20, 30)], Extent(5, 25))
    assert left == (Extent(0, 5), Extent(25, 30))


def test_natural_order_counts_layers_as_numbers() -> None:
    names = ["layers.10.b", "layers.2.w", "layers.2.b", "embed", "layers.1"]
    plan = make_plan([shard(TWO[0], *names)], None, None)
    ordered = [p.name for p in natural_order(plan.places)]
    assert ordered == ["embed", "layers.1", "layers.2.b", "layers.2.w", "layers.10.b"]


extents = st.tuples(st.integers(0, 200), st.integers(0, 50)).map(lambda t: Extent(t[0], sum(t)))


@settings(deadline=None)
@given(st.lists(extents, max_size=6), extents)
def test_what_is_known_is_cut_out_and_nothing_else(wanted: list[Extent], known: Extent) -> None:
    def positions(found: object) -> set[int]:
        assert isinstance(found, list | tuple)
        return {i for e in found for i in range(e.start, e.stop)}

    assert positions(without(wanted, known)) == positions(wanted) - positions([known])
