"""`load_into`: modules on meta and in memory, tied weights, what torch says of wrong keys."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import SettingsFactory
from tests.kit.proxy import FaultProxy
from tests.loader.conftest import ModelFactory
from torch import nn

from weightstream.loader import load_into


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.register_buffer("scale", torch.ones(3))
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.body(self.embed(x)))
        return hidden


def reference(seed: int = 1) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def save(folder: Path, module: nn.Module, *drop: str) -> Path:
    state = {n: t.detach().clone() for n, t in module.state_dict().items() if n not in drop}
    save_file(state, folder / "model.safetensors")
    return folder


def on_meta() -> Tied:
    with torch.device("meta"):
        return Tied()


def same_modules(one: nn.Module, two: nn.Module) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize("drop", [(), ("head.weight",), ("embed.weight",)], ids=str)
@pytest.mark.parametrize("meta", [True, False])
def test_a_tied_module_stays_tied(tmp_path: Path, meta: bool, drop: tuple[str, ...]) -> None:
    expected = reference()
    target = on_meta() if meta else reference(2)
    keys = load_into(target, save(tmp_path, expected, *drop))
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert same_modules(target, expected)
    assert target.head.weight is target.embed.weight
    ids = torch.arange(5)
    assert torch.equal(target(ids), expected(ids))


def test_a_module_in_memory_keeps_its_own_tensors(tmp_path: Path) -> None:
    target = reference(2)
    before = {name: p.data_ptr() for name, p in target.named_parameters()}
    load_into(target, save(tmp_path, reference()))
    assert {name: p.data_ptr() for name, p in target.named_parameters()} == before
    assert all(p.requires_grad for p in target.parameters())


@pytest.mark.parametrize("meta", [True, False])
def test_wrong_keys_are_refused_in_torchs_words(tmp_path: Path, meta: bool) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    torch_says = ""
    good = Other()
    state = {"a.weight": good.a.weight.detach(), "c": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors")
    try:
        Other().load_state_dict(state)
    except RuntimeError as error:
        torch_says = str(error)
    with torch.device("meta" if meta else "cpu"):
        target = Other()
    with pytest.raises(RuntimeError) as caught:
        load_into(target, tmp_path)
    assert str(caught.value) == torch_says
    keys = load_into(target, tmp_path, strict=False)
    assert keys.missing_keys == ["a.bias", "b.weight", "b.bias"]
    assert keys.unexpected_keys == ["c"]
    assert torch.equal(target.a.weight, good.a.weight)


def test_a_wrong_shape_is_torchs_error(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3, 3), "bias": torch.ones(2)}, tmp_path / "m.safetensors")
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        load_into(nn.Linear(2, 2), tmp_path)


def test_dtypes_follow_torchs_rule(tmp_path: Path) -> None:
    save_file(
        {"weight": torch.ones(2, 2, dtype=torch.bfloat16), "bias": torch.ones(2)},
        tmp_path / "m.safetensors",
    )
    here = nn.Linear(2, 2)
    load_into(here, tmp_path)
    assert here.weight.dtype == torch.float32, "copied into what is there"
    with torch.device("meta"):
        there = nn.Linear(2, 2)
    load_into(there, tmp_path)
    assert there.weight.dtype == torch.bfloat16, "assigned as it is"
    with torch.device("meta"):
        cast = nn.Linear(2, 2)
    load_into(cast, tmp_path, dtype="float32")
    assert cast.weight.dtype == torch.float32


def test_modules_that_rewrite_state_dicts_get_all_at_once(tmp_path: Path) -> None:
    class Renamed(nn.Linear):
        def _load_from_state_dict(
            self, state_dict: dict[str, torch.Tensor], *args: Any, **options: Any
        ) -> None:
            state_dict["weight"] = state_dict.pop("kernel")
            super()._load_from_state_dict(state_dict, *args, **options)

    kernel = torch.randn(2, 2)
    save_file({"kernel": kernel, "bias": torch.zeros(2)}, tmp_path / "m.safetensors")
    target = Renamed(2, 2)
    load_into(target, tmp_path)
    assert torch.equal(target.weight, kernel)


def test_batch_norm_and_buffers(tmp_path: Path) -> None:
    expected = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    expected(torch.randn(8, 4))
    target = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    load_into(target, save(tmp_path, expected))
    assert same_modules(target, expected)


def test_wrong_keys_are_refused_before_a_tensor_moves(
    put: ModelFactory, proxy: FaultProxy, tmp_path: Path, store_settings: SettingsFactory
) -> None:
    big = nn.Linear(1024, 1024, bias=False)
    save_file({"weight": big.weight.detach()}, tmp_path / "m.safetensors")
    model = put({"model.safetensors": (tmp_path / "m.safetensors").read_bytes()})
    with pytest.raises(RuntimeError, match="Missing key"):
        load_into(
            nn.Linear(1024, 1024), model.uri, settings=model.settings, storage_options=model.options
        )
    assert proxy.body_bytes(".safetensors") <= 256 << 10
    load_into(big, model.uri, settings=model.settings, storage_options=model.options)
    assert torch.equal(big.weight, model.tensors["weight"])
