"""Models for tests: valid safetensors files of any shape and size, the same at every call.

The bytes are BLAKE3 output (1 GB/s and more), so every chunk differs from every other, a byte in a
wrong place is seen, and floating point tensors hold NaNs of all kinds: compare with `same`, which
looks at bits.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
_WRITE_STEP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return its bytes in the file."""
        return ITEM_BYTES[self.dtype] * prod(self.shape)


def random_bytes(size: int, seed: str, start: int = 0) -> bytes:
    """Return bytes [start, start + size) of the endless sequence that `seed` names."""
    return blake3(seed.encode()).digest(length=size, seek=start)


def head(specs: Iterable[Spec], pad: int = 8) -> bytes:
    """Return the length prefix and the JSON header, padded with spaces as safetensors does."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        entry = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + spec.size]}
        entries[spec.name] = entry
        at += spec.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % pad)
    return len(text).to_bytes(8, "little") + text


def shard(specs: Iterable[Spec], seed: str = "model") -> bytes:
    """Return a whole safetensors file."""
    specs = tuple(specs)
    return head(specs) + random_bytes(sum(spec.size for spec in specs), seed)


def tiny(seed: str = "tiny") -> dict[str, bytes]:
    """Return a one-file model of a few kilobytes with every awkward kind of tensor."""
    specs = (
        Spec("embed.weight", "F32", (37, 11)),
        Spec("layer.0.weight", "BF16", (64, 33)),
        Spec("layer.0.bias", "F16", (33,)),
        Spec("odd.mask", "U8", (7,)),
        Spec("scale", "F32", ()),
        Spec("empty", "F32", (0, 5)),
        Spec("ids", "I64", (13,)),
    )
    return {"config.json": b'{"model_type": "tiny"}', "model.safetensors": shard(specs, seed)}


def plain(size: int, tensors: int = 8, seed: str = "plain") -> dict[str, bytes]:
    """Return a one-file model of about `size` bytes in equal tensors."""
    each = max(1, size // tensors // 4)
    specs = (Spec(f"layer.{i}.weight", "F32", (each,)) for i in range(tensors))
    return {"model.safetensors": shard(specs, seed)}


def sharded(shards: int, size: int, seed: str = "sharded") -> dict[str, bytes]:
    """Return a model of about `size` bytes in several files with an index."""
    files: dict[str, bytes] = {"config.json": b"{}"}
    where: dict[str, str] = {}
    each = max(1, size // shards // 3 // 2)
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        specs = [Spec(f"layers.{i}.{part}.weight", "BF16", (each,)) for part in ("q", "k", "mlp")]
        files[name] = shard(specs, f"{seed}-{i}")
        where |= {spec.name: name for spec in specs}
    total = sum(map(len, files.values()))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def llama_specs(size: int, hidden: int = 1024) -> Iterator[Spec]:
    """Give the tensors of a Llama-shaped model of about `size` bytes in BF16."""
    yield Spec("model.embed_tokens.weight", "BF16", (max(1, size // 8 // hidden // 2), hidden))
    used, layer = size // 8, 0
    while used < size:
        for spec in _layer(f"model.layers.{layer}", hidden):
            used += spec.size
            yield spec
        layer += 1
    yield Spec("model.norm.weight", "BF16", (hidden,))


def _layer(name: str, hidden: int) -> list[Spec]:
    wide = hidden * 7 // 2
    shapes = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    return [Spec(f"{name}.{part}.weight", "BF16", shape) for part, shape in shapes.items()]


def write_llama(folder: Path, size: int, shards: int = 4, seed: str = "llama") -> int:
    """Write a sharded Llama-shaped model to disk in bounded memory; return its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[Spec]] = [[] for _ in range(shards)]
    used = 0
    for spec in llama_specs(size):
        parts[min(shards - 1, used * shards // size)].append(spec)
        used += spec.size
    where: dict[str, str] = {}
    total = 0
    for i, specs in enumerate(parts):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        total += _write(folder / name, specs, f"{seed}-{i}")
        where |= {spec.name: name for spec in specs}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write(path: Path, specs: list[Spec], seed: str) -> int:
    size = sum(spec.size for spec in specs)
    with path.open("wb") as file:
        file.write(head(specs))
        for at in range(0, size, _WRITE_STEP_BYTES):
            file.write(random_bytes(min(_WRITE_STEP_BYTES, size - at), seed, at))
        return file.tell()


def tensors(files: Mapping[str, bytes]) -> "dict[str, torch.Tensor]":
    """Return what safetensors itself reads from the files of a model."""
    from safetensors.torch import load

    found: dict[str, torch.Tensor] = {}
    for name, data in files.items():
        if name.endswith(".safetensors"):
            found |= load(data)
    return found


def same(one: "Mapping[str, torch.Tensor]", two: "Mapping[str, torch.Tensor]") -> bool:
    """Say whether two state dicts hold the same names, dtypes, shapes and bits."""
    import torch

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().flatten().view(torch.uint8)

    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype
        and one[name].shape == two[name].shape
        and torch.equal(bits(one[name]), bits(two[name]))
        for name in one
    )
