"""s3fs downloads the prefix to disk, safetensors maps it: what most pipelines do today."""

from pathlib import Path

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload


def _setup(job: Job) -> None:
    preload("s3fs", "safetensors.torch")


def _load(job: Job, first: First) -> Tensors:
    import s3fs
    from safetensors.torch import load_file

    filesystem = s3fs.S3FileSystem(client_kwargs={"endpoint_url": job.endpoint})
    keys = [f"{job.bucket}/{key}" for key in job.keys]
    paths = [str(Path(job.scratch) / key.rsplit("/", 1)[-1]) for key in job.keys]
    filesystem.get(keys, paths)
    tensors: Tensors = {}
    for path in paths:
        tensors.update(load_file(path))
        first()
    return tensors


PEER = Peer(_setup, _load, maps=True, packages=("s3fs", "aiobotocore", "safetensors"))
