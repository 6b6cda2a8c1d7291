"""Ray Serve: replicas that start in seconds, scale by concurrency and move unnoticed.

Names are imported when they are asked for: a replica that only loads a model pays for nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightstream.serve_integration.loading.model import aload_model, load_model
    from weightstream.serve_integration.loading.phases import Phases
    from weightstream.serve_integration.loading.prefetching import Prefetch, prefetch
    from weightstream.serve_integration.loading.reload import Reloadable
    from weightstream.serve_integration.nodes import (
        Warming,
        cluster_status,
        down,
        held,
        pick_nodes,
        prewarm,
        up,
        warm,
    )
    from weightstream.serve_integration.scaling.options import autoscaling, bounded_queue

_WHERE: dict[str, str] = {
    "Phases": "weightstream.serve_integration.loading.phases",
    "Prefetch": "weightstream.serve_integration.loading.prefetching",
    "Reloadable": "weightstream.serve_integration.loading.reload",
    "Warming": "weightstream.serve_integration.nodes",
    "aload_model": "weightstream.serve_integration.loading.model",
    "autoscaling": "weightstream.serve_integration.scaling.options",
    "bounded_queue": "weightstream.serve_integration.scaling.options",
    "cluster_status": "weightstream.serve_integration.nodes",
    "down": "weightstream.serve_integration.nodes",
    "held": "weightstream.serve_integration.nodes",
    "load_model": "weightstream.serve_integration.loading.model",
    "pick_nodes": "weightstream.serve_integration.nodes",
    "prefetch": "weightstream.serve_integration.loading.prefetching",
    "prewarm": "weightstream.serve_integration.nodes",
    "up": "weightstream.serve_integration.nodes",
    "warm": "weightstream.serve_integration.nodes",
}
"""Public name -> the module that has it; beside it, the same imports for type checkers."""

__all__ = [
    "Phases",
    "Prefetch",
    "Reloadable",
    "Warming",
    "aload_model",
    "autoscaling",
    "bounded_queue",
    "cluster_status",
    "down",
    "held",
    "load_model",
    "pick_nodes",
    "prefetch",
    "prewarm",
    "up",
    "warm",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
