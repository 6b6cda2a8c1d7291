"""The file that a cluster loads."""

from pathlib import Path

from blake3 import blake3
from safetensors import safe_open

from weightstream.bench.cluster.model import write_model

MIB = 1 << 20


def test_it_is_a_model_of_that_size(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole, data = write_model(path, 3 * MIB + 12345)
    assert path.stat().st_size == 3 * MIB + 12345
    assert blake3(path.read_bytes()).hexdigest() == whole
    hasher = blake3()
    with safe_open(path, "pt") as model:
        for name in sorted(model.keys()):
            hasher.update(model.get_tensor(name).numpy().tobytes())
    assert hasher.hexdigest() == data
