"""The CUDA destination, on a machine that has one: pinned slabs, copy stream, per-tensor events."""

import gc
from pathlib import Path

import pytest
import torch
from tests.kit import models
from tests.loader.conftest import ModelFactory

from weightstream.cachefs.fetch import process_engine
from weightstream.errors import UsageError
from weightstream.loader import load, load_into, stream
from weightstream.loader import open as open_model

MIB = 1 << 20

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_is_said_so(tmp_path: Path) -> None:
    for device in ("cuda", "cuda:1", 0):
        with pytest.raises(UsageError, match="finds no CUDA device"):
            load(tmp_path, device=device)


def on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    assert all(tensor.is_cuda for tensor in tensors.values())
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("files", [models.tiny(), models.sharded(3, 48 * MIB)], ids=["tiny", "big"])
def test_cold_and_warm_loads_equal_safetensors(
    put: ModelFactory, files: dict[str, bytes], tmp_path: Path
) -> None:
    model = put(files, memory_budget=16 * MIB)
    for _ in ("cold", "warm"):
        found = load(
            model.uri, device="cuda", settings=model.settings, storage_options=model.options
        )
        assert models.same(on_host(found), model.tensors)
        model.wait_for_store()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert models.same(on_host(load(tmp_path, device=0)), model.tensors)


@gpu
@pytest.mark.gpu
def test_streams_are_bounded_and_ordered_with_the_consumers_stream(put: ModelFactory) -> None:
    model = put(models.plain(64 * MIB, tensors=32), memory_budget=16 * MIB)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        sums = {
            name: tensor.view(torch.uint8).sum(dtype=torch.int64)
            for name, tensor in stream(
                model.uri,
                device="cuda",
                order="natural",
                settings=model.settings,
                storage_options=model.options,
            )
        }
    side.synchronize()
    expected = {n: t.view(torch.uint8).sum(dtype=torch.int64) for n, t in model.tensors.items()}
    assert {n: int(t) for n, t in sums.items()} == {n: int(t) for n, t in expected.items()}
    gc.collect()
    engine = process_engine(model.settings)
    assert engine.write_back.drain(10)
    engine.slabs.trim()
    assert engine.budget.used_bytes == 0


@gpu
@pytest.mark.gpu
def test_single_tensors_and_modules(put: ModelFactory, tmp_path: Path) -> None:
    model = put(models.tiny())
    given = {"settings": model.settings, "storage_options": model.options}
    with open_model(model.uri, device="cuda", **given) as opened:  # type: ignore[arg-type]
        tensor = opened.get_tensor("ids")
        assert torch.equal(tensor.cpu(), model.tensors["ids"])
        part = opened.get_slice("layer.0.weight")[3:9, :5].contiguous().cpu()
    expected = model.tensors["layer.0.weight"][3:9, :5]
    assert torch.equal(part.view(torch.uint8), expected.contiguous().view(torch.uint8))
    from safetensors.torch import save_file

    source = torch.nn.Linear(64, 64)
    save_file(dict(source.state_dict()), tmp_path / "m.safetensors")
    target = torch.nn.Linear(64, 64, device="cuda")
    load_into(target, tmp_path)
    assert torch.equal(target.weight.cpu(), source.weight)
