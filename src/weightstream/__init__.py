"""Model weights from object storage to a ready replica in seconds.

The public face is five names; everything else is reached through its folder. They are imported on
first use, so that `import weightstream` costs milliseconds and needs neither torch nor s3fs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightstream.loader import aload, load, load_into, open, stream

__version__ = "0.1.0"

__all__ = ["__version__", "aload", "load", "load_into", "open", "stream"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("weightstream.loader"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
