"""safetensors itself on local files: `load_file`, mapped (its default) or read.

Options: `backend` (mmap or pread).
"""

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload


def _setup(job: Job) -> None:
    preload("safetensors.torch")


def _load(job: Job, first: First) -> Tensors:
    from safetensors.torch import load_file

    backend = job.options.get("backend")
    keywords = {"backend": backend} if backend else {}
    tensors: Tensors = {}
    for path in job.files:
        tensors.update(load_file(path, **keywords))
        first()
    return tensors


PEER = Peer(_setup, _load, maps=True, packages=("safetensors",))
