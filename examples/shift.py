"""The model of the examples: a Caesar cipher whose key lies in its weights, so answers are known.

`MODELS` names the prefix that the models are under, such as `s3://models/shift`; without it they
are made in a folder of this machine.
"""

import os
import tempfile
from pathlib import Path

import torch


class Shift(torch.nn.Module):
    """Shifts each letter by the key of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding(26, 26)
        self.letters: torch.Tensor
        self.register_buffer("letters", torch.arange(97.0, 123.0), persistent=False)  # in no file

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the codes of the shifted letters."""
        rows: torch.Tensor = self.rows(codes - 97)
        return (rows @ self.letters.to(rows.dtype)).long()

    def text(self, text: str) -> str:
        """Shift a text of small letters."""
        return bytes(self(torch.tensor(list(text.encode()))).tolist()).decode()


def weights(key: int) -> dict[str, torch.Tensor]:
    """Return the state dict that shifts by `key`."""
    return {"rows.weight": torch.eye(26).roll(key, dims=1)}


def uri(key: int | str) -> str:
    """Return where the model with this key is."""
    return f"{os.environ.get('MODELS') or _make_models()}/{key}"


def _make_models() -> Path:
    from safetensors.torch import save_file

    home = Path(tempfile.gettempdir()) / f"weightstream-examples-{os.getuid()}"
    for key in range(26):
        (home / str(key)).mkdir(parents=True, exist_ok=True)
        partial = home / f"{key}.{os.getpid()}"
        save_file(weights(key), partial)
        partial.rename(home / str(key) / "model.safetensors")
    return home
