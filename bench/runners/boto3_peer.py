"""boto3's transfer manager downloads the shards to disk, safetensors maps them."""

from pathlib import Path

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload


def _setup(job: Job) -> None:
    preload("boto3", "safetensors.torch")


def _load(job: Job, first: First) -> Tensors:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config
    from safetensors.torch import load_file

    threads = int(job.options.get("threads", "10"))
    config = Config(s3={"addressing_style": "path"}, max_pool_connections=threads + 4)
    client = boto3.client("s3", config=config)
    transfer = TransferConfig(max_concurrency=threads)
    paths = []
    for key in job.keys:
        path = Path(job.scratch) / key.rsplit("/", 1)[-1]
        client.download_file(job.bucket, key, str(path), Config=transfer)
        paths.append(path)
    tensors: Tensors = {}
    for path in paths:
        tensors.update(load_file(path))
        first()
    return tensors


PEER = Peer(_setup, _load, maps=True, packages=("boto3", "s3transfer", "safetensors"))
