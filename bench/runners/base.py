"""What a peer is to the benchmark: a set-up that is not timed, a load that is."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from weightstream.bench.jobs import Job

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
First = Callable[[], None]
"""Called by a peer when its first tensor is in the caller's hands."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to get weights into memory.

    `setup` imports what the peer needs and makes its clients; `load` returns all tensors, or None
    for a raw transfer. `maps` says that pages arrive only when touched, which is then timed as part
    of the load. `packages` are the distributions whose versions the report names.
    """

    setup: Callable[[Job], None]
    load: Callable[[Job, First], Tensors | None]
    maps: bool = False
    packages: tuple[str, ...] = ()


def preload(*modules: str) -> None:
    """Import what a load will need, so that its clock does not count imports."""
    for module in modules:
        import_module(module)
