"""safetensors-streaming (Rust): all shards of an index over plain HTTP(S), or local files."""

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload


def _setup(job: Job) -> None:
    preload("safetensors_streaming", "torch")


def _load(job: Job, first: First) -> Tensors:
    from safetensors_streaming import stream_sharded

    tensors: Tensors = {}
    for name, tensor in stream_sharded(f"{job.url}/model.safetensors.index.json"):
        first()
        tensors[name] = tensor
    return tensors


PEER = Peer(_setup, _load, packages=("safetensors-streaming",))
