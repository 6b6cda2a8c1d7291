"""CoreWeave tensorizer: its own format, converted beforehand, streamed over HTTP by curl processes.

Options: `readers` (parallel readers; its own choice when absent), `convert` (a folder: write the
converted model there instead of loading).
"""

from pathlib import Path

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload

FILE = "model.tensors"


def _setup(job: Job) -> None:
    preload("tensorizer", "torch")


def _load(job: Job, first: First) -> Tensors:
    if "convert" in job.options:
        return _convert(job)
    from tensorizer import TensorDeserializer

    readers = job.options.get("readers")
    url = f"{job.url}-tensorizer/{FILE}"
    source = TensorDeserializer(url, device="cpu", num_readers=int(readers) if readers else None)
    tensors: Tensors = {}
    for name, tensor in source.items():
        first()
        tensors[name] = tensor.detach()
    source.close()
    return tensors


def _convert(job: Job) -> Tensors:
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    tensors = {name: tensor for path in job.files for name, tensor in load_file(path).items()}
    serializer = TensorSerializer(str(Path(job.options["convert"]) / FILE))
    serializer.write_state_dict(tensors)
    serializer.close()
    return tensors


PEER = Peer(_setup, _load, packages=("tensorizer",))
