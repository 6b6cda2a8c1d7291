"""s3torchconnector (the CRT client in Rust): whole objects read into bytes, shards in parallel."""

from concurrent.futures import ThreadPoolExecutor

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload

_REGION = "us-east-1"


def _setup(job: Job) -> None:
    preload("s3torchconnector", "safetensors.torch")


def _load(job: Job, first: First) -> Tensors:
    from s3torchconnector import S3Checkpoint, S3ClientConfig
    from safetensors.torch import load

    gbps = float(job.options.get("target_gbps", "10"))
    config = S3ClientConfig(force_path_style=True, throughput_target_gbps=gbps)
    client = S3Checkpoint(region=_REGION, endpoint=job.endpoint, s3client_config=config)

    def read(key: str) -> Tensors:
        with client.reader(f"s3://{job.bucket}/{key}") as reader:
            tensors: Tensors = load(reader.read())
        first()
        return tensors

    with ThreadPoolExecutor(int(job.options.get("shards", "4"))) as pool:
        parts = list(pool.map(read, job.keys))
    return {name: tensor for part in parts for name, tensor in part.items()}


PEER = Peer(_setup, _load, packages=("s3torchconnector", "s3torchconnectorclient"))
