"""Where the examples' models are: a Caesar cipher each, whose key lies in the weights.

`MODELS` names the prefix that they are under, such as `s3://models/shift`; without it they are made
in a folder of this machine. Imports no torch, so that weights are on their way before it is there.
"""

import os
import tempfile
from pathlib import Path


def uri(key: int | str) -> str:
    """Return where the model with this key is."""
    return f"{os.environ.get('MODELS') or _make_models()}/{key}"


def _make_models() -> Path:
    home = Path(tempfile.gettempdir()) / f"weightstream-examples-{os.getuid()}"
    for key in range(26):
        path = home / str(key) / "model.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_model(path, key)
    return home


def _make_model(path: Path, key: int) -> None:
    from safetensors.torch import save_file

    from examples.shift import weights

    partial = path.with_suffix(f".{os.getpid()}")
    save_file(weights(key), partial)
    partial.rename(path)
