"""Run:ai Model Streamer, from S3 or from local files.

Its knobs are environment variables (RUNAI_STREAMER_*), set by the scenario for the whole process.
Options: `from` (s3 or files).
"""

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload


def _setup(job: Job) -> None:
    preload("runai_model_streamer", "torch")
    if job.options.get("from") != "files":
        preload("runai_model_streamer_s3", "boto3")


def _load(job: Job, first: First) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer, list_safetensors

    local = job.options.get("from") == "files"
    paths = list(job.files) if local else list_safetensors(job.uri + "/")
    tensors: Tensors = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths, device="cpu", is_distributed=False)
        for name, tensor in streamer.get_tensors():
            first()
            tensors[name] = tensor
    return tensors


PEER = Peer(_setup, _load, packages=("runai-model-streamer", "runai-model-streamer-s3"))
