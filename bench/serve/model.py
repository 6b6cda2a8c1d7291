"""The model that the replicas load: plain matrices of a GiB in four shards, and its module."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

LAYERS = 16
_ROWS, _COLUMNS = 4096, 8192  # 64 MiB in bfloat16
_PER_SHARD = 4


def write(folder: Path) -> int:
    """Write the model's files; return their bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    where: dict[str, str] = {}
    for shard in range(LAYERS // _PER_SHARD):
        name = f"model-{shard + 1:05}-of-{LAYERS // _PER_SHARD:05}.safetensors"
        layers = range(shard * _PER_SHARD, (shard + 1) * _PER_SHARD)
        generator = torch.Generator().manual_seed(shard)
        tensors = {
            f"{layer}.weight": torch.randn(_ROWS, _COLUMNS, generator=generator).bfloat16()
            for layer in layers
        }
        save_file(tensors, folder / name)
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(file.stat().st_size for file in folder.iterdir())


def build() -> "nn.Module":
    """Make the module; under `torch.device("meta")` it costs nothing."""
    import torch
    from torch import nn

    return nn.ModuleList(
        nn.Linear(_COLUMNS, _ROWS, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)
    )
