"""Safetensors from anywhere into torch: plans, destinations, state dicts.

`load` brings a model at once, `stream` one tensor after the other in bounded memory, `load_into`
fills a module, `open` reads single tensors, `aload` is for event loops.
"""

from weightstream.loader.api import aload, load, load_into, load_with_report, open, stream
from weightstream.loader.opened import OpenedModel, TensorSlice
from weightstream.loader.report import LoadReport
from weightstream.loader.streamed import TensorStream
from weightstream.loader.whole import Loaded

__all__ = [
    "LoadReport",
    "Loaded",
    "OpenedModel",
    "TensorSlice",
    "TensorStream",
    "aload",
    "load",
    "load_into",
    "load_with_report",
    "open",
    "stream",
]
