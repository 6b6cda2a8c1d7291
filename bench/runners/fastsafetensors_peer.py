"""fastsafetensors on local files, without GPU Direct Storage.

O_DIRECT is its default; FASTSAFETENSORS_ODIRECT=0 in the environment lets it use the page cache.
"""

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload


def _setup(job: Job) -> None:
    preload("fastsafetensors", "torch")


def _load(job: Job, first: First) -> Tensors:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cpu", nogds=True, max_threads=16)
    loader.add_filenames({0: list(job.files)})
    files = loader.copy_files_to_device()
    tensors: Tensors = {}
    for name in loader.get_keys():
        tensors[name] = files.get_tensor(name)
        first()
    files.close()
    loader.close()
    return tensors


PEER = Peer(_setup, _load, packages=("fastsafetensors",))
