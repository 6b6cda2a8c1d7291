"""weightstream itself.

Its settings are WEIGHTSTREAM_* variables, set by the scenario for the whole process. Options:
`mode` (load, stream, or consume: stream and drop every tensor, which is what bounds its memory),
`device`, `warm` (tensors are mapped from the store; nothing of the origin side may be imported).
"""

from weightstream.bench.jobs import Job
from weightstream.bench.runners.base import First, Peer, Tensors, preload


def _setup(job: Job) -> None:
    preload("torch", "weightstream.loader")
    if job.options.get("warm") != "yes":
        preload("s3fs", "weightstream.cachefs.origin.s3")


def _load(job: Job, first: First) -> Tensors | None:
    import weightstream

    mode = job.options.get("mode", "load")
    device = job.options.get("device", "cpu")
    if mode == "load":
        tensors: Tensors = weightstream.load(job.uri, device=device)
        return tensors
    kept: Tensors = {}
    for name, tensor in weightstream.stream(job.uri, device=device):
        first()
        if mode == "stream":
            kept[name] = tensor
    return kept if mode == "stream" else None


PEER = Peer(_setup, _load, packages=("weightstream",))
