"""Writes a Llama-shaped bf16 checkpoint of a given size: the same bytes every time, at disk speed.

Demo and bench need gigabytes of weights that nobody has to download. Names, shapes, shards and the
index are those of a Hugging Face Llama; the values are pseudo-random, finite and of the size that
weights have, so that they neither compress nor break arithmetic.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

_BF16_BYTES = 2
_BLOCK_BYTES = 8 << 20
# Sign and mantissa stay random, the exponent becomes 120 or 121: +-[2^-7, 2^-5).
_KEEP = np.uint64(0x80FF80FF80FF80FF)
_EXPONENT = np.uint64(0x3C003C003C003C00)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name and shape of one bf16 tensor."""

    name: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Return the bytes of the tensor's data."""
        return int(np.prod(self.shape)) * _BF16_BYTES


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A written checkpoint: the folder, its shards in order and the sum of their sizes."""

    folder: Path
    files: tuple[Path, ...]
    size_bytes: int


def llama_tensors(size_bytes: int) -> tuple[TensorSpec, ...]:
    """Return the tensors of a Llama whose weights take about `size_bytes`, in file order."""
    hidden = _hidden_size(size_bytes)
    layer = _layer(0, hidden)
    layer_bytes = sum(spec.size_bytes for spec in layer)
    layers = max(1, int(size_bytes * 0.9) // layer_bytes)
    rows = max(1, (size_bytes - layers * layer_bytes) // (2 * hidden * _BF16_BYTES))
    body = [spec for index in range(layers) for spec in _layer(index, hidden)]
    return (
        TensorSpec("model.embed_tokens.weight", (rows, hidden)),
        *body,
        TensorSpec("model.norm.weight", (hidden,)),
        TensorSpec("lm_head.weight", (rows, hidden)),
    )


def write_checkpoint(folder: Path, size_bytes: int, shards: int) -> Checkpoint:
    """Write the checkpoint into `folder`, or find it there: the index is written last."""
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        folder.mkdir(parents=True, exist_ok=True)
        tensors = llama_tensors(size_bytes)
        weight_map: dict[str, str] = {}
        for name, part in zip(names, _split(tensors, shards), strict=True):
            _write_shard(folder / name, part)
            weight_map.update({spec.name: name for spec in part})
        total = sum(spec.size_bytes for spec in tensors)
        _write_index(index, total, weight_map)
    files = tuple(folder / name for name in names)
    return Checkpoint(folder, files, sum(file.stat().st_size for file in files))


def _hidden_size(size_bytes: int) -> int:
    """Return the largest hidden size of which eight layers fit; a layer has 14.5 h^2 weights."""
    for hidden in (8192, 4096, 2048, 1024, 512, 256):
        if 8 * 29 * hidden * hidden <= size_bytes:
            return hidden
    return 128


def _layer(index: int, hidden: int) -> tuple[TensorSpec, ...]:
    prefix = f"model.layers.{index}."
    inner, kv = 4 * hidden, hidden // 4
    return (
        TensorSpec(prefix + "input_layernorm.weight", (hidden,)),
        TensorSpec(prefix + "mlp.down_proj.weight", (hidden, inner)),
        TensorSpec(prefix + "mlp.gate_proj.weight", (inner, hidden)),
        TensorSpec(prefix + "mlp.up_proj.weight", (inner, hidden)),
        TensorSpec(prefix + "post_attention_layernorm.weight", (hidden,)),
        TensorSpec(prefix + "self_attn.k_proj.weight", (kv, hidden)),
        TensorSpec(prefix + "self_attn.o_proj.weight", (hidden, hidden)),
        TensorSpec(prefix + "self_attn.q_proj.weight", (hidden, hidden)),
        TensorSpec(prefix + "self_attn.v_proj.weight", (kv, hidden)),
    )


def _split(tensors: Sequence[TensorSpec], shards: int) -> list[list[TensorSpec]]:
    """Cut the tensors, in order, into parts of about equal bytes."""
    total = sum(spec.size_bytes for spec in tensors)
    parts: list[list[TensorSpec]] = [[] for _ in range(shards)]
    done = 0
    for spec in tensors:
        middle = done + spec.size_bytes // 2
        parts[min(shards - 1, middle * shards // total)].append(spec)
        done += spec.size_bytes
    return parts


def _write_shard(path: Path, tensors: Sequence[TensorSpec]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in tensors:
        offsets = [offset, offset + spec.size_bytes]
        header[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": offsets}
        offset += spec.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for spec in tensors:
            for block in _values(spec):
                out.write(block)
    os.replace(temporary, path)


def _values(spec: TensorSpec) -> Iterator[memoryview]:
    """Yield the tensor's bytes; the generator is seeded with its name."""
    generator = np.random.Generator(np.random.SFC64(crc32(spec.name.encode())))
    left = spec.size_bytes
    while left:
        count = min(left, _BLOCK_BYTES)
        words = generator.integers(0, 1 << 64, size=-(-count // 8), dtype=np.uint64)
        words &= _KEEP
        words |= _EXPONENT
        yield words.data.cast("B")[:count]
        left -= count


def _write_index(path: Path, total_bytes: int, weight_map: dict[str, str]) -> None:
    text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=1)
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    os.replace(temporary, path)
