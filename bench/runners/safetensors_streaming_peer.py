"""safetensors-streaming (Rust): all shards of an index over plain HTTP(S), or local files."""

from importlib import import_module
from typing import Any

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload


def _setup(job: Job) -> None:
    preload("safetensors_streaming", "torch")


def _load(job: Job, first: First) -> Tensors:
    streaming: Any = import_module("safetensors_streaming")  # exports are those of its .so

    tensors: Tensors = {}
    for name, tensor in streaming.stream_sharded(f"{job.url}/model.safetensors.index.json"):
        first()
        tensors[name] = tensor
    return tensors


PEER = Peer(_setup, _load, packages=("safetensors-streaming",))
