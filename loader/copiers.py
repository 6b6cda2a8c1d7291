"""How staged bytes get from a slab into a tensor of their own: the protocol, and the host's way."""

import ctypes
import mmap
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from weightstream.cachefs.fetch.memory import allocate
from weightstream.loader.plan import Place
from weightstream.loader.views import torch_shape, torch_type

if TYPE_CHECKING:
    import torch

_OWN_MAPPING_BYTES = 1 << 20
"""From here on a tensor gets a mapping of its own, with huge pages where they fit. Smaller ones
share the heap: a process may have 65,530 mappings, and a model more small tensors than that."""


class Staged(Protocol):
    """Slab memory, held while it is copied from."""

    view: memoryview

    def hold(self) -> None:
        """Keep the slab for one more user."""
        ...

    def release(self) -> None:
        """Say that one user is done."""
        ...


class Copier(Protocol):
    """Moves bytes into tensors on one device. `copy` is called from the engine's threads."""

    def take_slab(self, count: int) -> Staged | None:
        """Return staging memory fit for this device, or None when there is none now."""
        ...

    def new_target(self, place: Place) -> object:
        """Return memory for one whole tensor."""
        ...

    def copy(self, target: object, at: int, slab: Staged, start: int, count: int) -> None:
        """Copy `count` bytes at `start` of the slab to `at` of the target, now or soon.

        The slab is held until the copy is done.
        """
        ...

    def finish(self, target: object, place: Place) -> "torch.Tensor":
        """Return the tensor, whose bytes were all given to `copy`; on the consumer's thread."""
        ...

    def close(self) -> None:
        """Wait for what is under way, and give staging memory back."""
        ...


class HostCopier:
    """Copies into host memory, at once, with the interpreter lock released."""

    def __init__(self, take_slab: Callable[[int], Staged | None]) -> None:
        self._take_slab = take_slab

    def take_slab(self, count: int) -> Staged | None:
        """Take a slab from the engine's pool."""
        return self._take_slab(count)

    def new_target(self, place: Place) -> "mmap.mmap | bytearray":
        """Return memory that the tensor will own."""
        count = len(place.info.extent)
        return allocate(count) if count >= _OWN_MAPPING_BYTES else bytearray(count)

    def copy(self, target: object, at: int, slab: Staged, start: int, count: int) -> None:
        """Copy now."""
        assert isinstance(target, mmap.mmap | bytearray)
        anchor = ctypes.c_char.from_buffer
        ctypes.memmove(
            ctypes.addressof(anchor(target, at)),
            ctypes.addressof(anchor(slab.view, start)),
            count,
        )

    def finish(self, target: object, place: Place) -> "torch.Tensor":
        """Return the tensor over its own memory."""
        import torch

        assert isinstance(target, mmap.mmap | bytearray)
        dtype, shape = torch_type(place.blob, place.info), torch_shape(place.blob, place.info)
        if len(place.info.extent) == 0:
            return torch.empty(shape, dtype=dtype)
        exact = memoryview(target)[: len(place.info.extent)]
        return torch.frombuffer(exact, dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Do nothing: no copy is left under way."""
