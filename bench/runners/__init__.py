"""One small module per peer; `python -m weightstream.bench.runners JOB` runs one sample.

A sample has its own process: pools, caches and allocators of one peer never help or hurt another.
"""

from importlib import import_module

from weightstream.bench.runners.base import Peer

NAMES = (
    "weightstream",
    "runai",
    "tensorizer",
    "s3torchconnector",
    "boto3",
    "s3fs",
    "safetensors_streaming",
    "fastsafetensors",
    "safetensors_file",
    "curl",
)


def peer(name: str) -> Peer:
    """Import the module of a peer (the libraries themselves are imported by its set-up)."""
    module = import_module(f"weightstream.bench.runners.{name}_peer")
    found = module.PEER
    assert isinstance(found, Peer)
    return found
