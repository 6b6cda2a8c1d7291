"""Ray Serve: replicas that start in seconds, scale by concurrency and move unnoticed.

Names are imported when they are asked for: a replica that only loads a model pays for nothing else.
"""

from importlib import import_module
from typing import Any

_WHERE: dict[str, str] = {}
"""Public name -> the module that has it; beside it, the same imports for type checkers."""

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
