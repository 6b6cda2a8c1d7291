"""`open` beside `safetensors.safe_open` on the same file: equal answers, and the bytes it cost."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tests.conftest import SettingsFactory
from tests.kit import models
from tests.kit.faults import When
from tests.kit.proxy import FaultProxy
from tests.loader.attacks.corpus import entry, file
from tests.loader.conftest import Model, ModelFactory

from weightstream.errors import UsageError
from weightstream.loader import OpenedModel
from weightstream.loader import open as open_model

MIB = 1 << 20


def begin(model: Model) -> OpenedModel:
    return open_model(model.uri, settings=model.settings, storage_options=model.options)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return path


@pytest.fixture(params=["local", "cold", "warm"])
def opened(
    request: pytest.FixtureRequest, put: ModelFactory, tmp_path: Path
) -> "tuple[OpenedModel, Path]":
    model = put(models.tiny())
    path = write(tmp_path, model.files["model.safetensors"])
    if request.param == "local":
        return open_model(path, settings=model.settings), path
    if request.param == "warm":
        from weightstream.loader import load

        load(model.uri, settings=model.settings, storage_options=model.options)
        model.wait_for_store()
    return begin(model), path


INDEXES = [
    slice(None),
    slice(1, 3),
    slice(-2, None),
    slice(3, 1),
    slice(0, 1000),
    slice(None, None, 2),
    0,
    -1,
    (0, 1),
    (slice(1, 3), slice(None, 2)),
    (..., 0),
    (slice(None), 1),
    (),
    ...,
    None,
    [0, 2],
]


def test_the_surface_is_that_of_safe_open(opened: "tuple[OpenedModel, Path]") -> None:
    model, path = opened
    with model, safe_open(path, "pt") as other:
        assert model.keys() == other.keys()
        assert model.metadata() == other.metadata() == {"format": "pt"}
        offsets = {name: i for i, name in enumerate(model.offset_keys())}
        theirs = [name for name in other.offset_keys() if name != "empty"]
        assert sorted(theirs, key=lambda name: offsets[name]) == theirs
        assert models.same(model.get_tensors(), other.get_tensors())
        for name in other.keys():  # noqa: SIM118
            assert models.same({name: model.get_tensor(name)}, {name: other.get_tensor(name)})
            ours, part = model.get_slice(name), other.get_slice(name)
            assert ours.get_shape() == part.get_shape()
            assert ours.get_dtype() == part.get_dtype()


@pytest.mark.parametrize("index", INDEXES, ids=repr)
def test_slices_equal_those_of_safe_open(opened: "tuple[OpenedModel, Path]", index: object) -> None:
    model, path = opened
    with model, safe_open(path, "pt") as other:
        theirs = other.get_slice("layer.0.weight")[index]
        assert models.same({"x": model.get_slice("layer.0.weight")[index]}, {"x": theirs})


def test_what_is_out_of_range_is_an_index_error(opened: "tuple[OpenedModel, Path]") -> None:
    model, _ = opened
    with model:
        for name, index in (("layer.0.weight", 64), ("layer.0.weight", (0, 99)), ("scale", 0)):
            with pytest.raises(IndexError):
                model.get_slice(name)[index]


def test_unknown_names_and_closed_models_are_refused(opened: "tuple[OpenedModel, Path]") -> None:
    model, _ = opened
    with model:
        kept = model.get_tensor("ids")
        for ask in (model.get_tensor, model.get_slice):
            with pytest.raises(UsageError, match="no tensor 'nobody'"):
                ask("nobody")
    for closed in (model.keys, model.metadata, model.get_tensors, model.offset_keys):
        with pytest.raises(UsageError, match="closed"):
            closed()
    assert kept.sum() == kept.clone().sum(), "what was given out stays valid"


def test_a_cold_tensor_costs_its_chunks_which_are_kept(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.plain(8 * MIB, tensors=8))
    with begin(model) as opened:
        header = proxy.body_bytes(".safetensors")
        assert header <= 256 << 10
        opened.get_tensor("layer.5.weight")
        first = proxy.body_bytes(".safetensors") - header
        assert first <= 2 * MIB + 16, "two chunks at most"
        model.wait_for_store()
        opened.get_tensor("layer.5.weight")
        assert proxy.body_bytes(".safetensors") - header == first, "it was kept"


def test_leading_rows_cost_their_own_chunks(put: ModelFactory, proxy: FaultProxy) -> None:
    entries = {"w": entry(0, 8 * MIB, "F32", [2048, 1024])}
    data = file(entries, models.random_bytes(8 * MIB, "rows"))
    model = put({"model.safetensors": data}, hedge="off")
    with begin(model) as opened:
        header = proxy.body_bytes(".safetensors")
        part = opened.get_slice("w")[512:768, :10]
        cost = proxy.body_bytes(".safetensors") - header
    assert models.same({"w": part}, {"w": model.tensors["w"][512:768, :10]})
    assert cost <= 2 * MIB


@pytest.mark.slow
def test_without_write_back_only_the_tensors_bytes_are_fetched(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.plain(8 * MIB, tensors=64), write_back="off")
    with begin(model) as opened:
        header = proxy.body_bytes(".safetensors")
        tensor = opened.get_tensor("layer.40.weight")
        assert proxy.body_bytes(".safetensors") - header == tensor.nbytes


def test_a_sharded_model_opens_as_one(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.sharded(3, 6 * MIB))
    with begin(model) as opened:
        assert opened.keys() == sorted(model.tensors)
        name = "layers.1.q.weight"
        assert models.same({name: opened.get_tensor(name)}, {name: model.tensors[name]})
        last = proxy.exchanges(When(key="00003-of", method="GET"))
        assert sum(e.body_bytes for e in last) <= 256 << 10
        assert models.same(opened.get_tensors(), model.tensors)


dims = st.lists(st.integers(0, 4), min_size=0, max_size=3)


@settings(deadline=None, max_examples=150)
@given(shape=dims, data=st.data())
def test_any_index_gives_what_torch_gives(
    shape: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    count = 1
    for n in shape:
        count *= n
    raw = file({"w": entry(0, count * 2, "I16", shape)}, bytes(i % 256 for i in range(count * 2)))
    path = tmp_path_factory.getbasetemp() / "index-under-test.safetensors"
    path.write_bytes(raw)
    one = st.one_of(
        st.integers(-5, 5),
        st.builds(slice, *[st.none() | st.integers(-5, 5)] * 2, st.none() | st.integers(1, 3)),
        st.just(...),
        st.none(),
    )
    index = data.draw(one | st.lists(one, max_size=4).map(tuple))
    with open_model(path) as opened:
        tensor = opened.get_tensor("w")
        try:
            expected = tensor[index]
        except (IndexError, TypeError, ValueError) as error:
            with pytest.raises(type(error)):
                opened.get_slice("w")[index]
        else:
            found = opened.get_slice("w")[index]
            assert found.shape == expected.shape
            assert torch.equal(found, expected)


def test_opening_needs_no_settings(store_settings: SettingsFactory, tmp_path: Path) -> None:
    path = write(tmp_path, models.tiny()["model.safetensors"])
    with open_model(path) as opened:
        assert isinstance(opened.get_tensor("scale"), torch.Tensor)
