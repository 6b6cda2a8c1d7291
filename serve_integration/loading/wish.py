"""What is to be fetched, and where it is to end up. Imports nothing heavy."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from weightstream.settings import Settings


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be fetched, and where it is to end up."""

    uri: str
    device: "str | int | torch.device | None" = None
    dtype: "torch.dtype | str | None" = None
    settings: "Settings | None" = None
    storage_options: Mapping[str, object] | None = None

    def is_of(self, other: "Wish") -> bool:
        """Say whether both want the same bytes; device and dtype can still be changed."""
        return (self.uri, self.settings, self.storage_options) == (
            other.uri,
            other.settings,
            other.storage_options,
        )


def make_wish(
    uri: "str | os.PathLike[str]",
    device: "str | int | torch.device | None",
    dtype: "torch.dtype | str | None",
    settings: "Settings | None",
    storage_options: Mapping[str, object] | None,
) -> Wish:
    """Return the wish; a trailing slash makes no other model of it."""
    return Wish(os.fspath(uri).rstrip("/"), device, dtype, settings, storage_options)
