"""serve.llm: the callback that keeps Ray from copying a model that is mounted.

Ray's LLM engine lets a callback act before it prepares the nodes. This one says that nothing is to
be downloaded, for the model is a path of a mount already, and has the agents of the replica's nodes
prefetch it while the engine still imports. docs/serve-llm.md has the whole configuration.
"""

from typing import TYPE_CHECKING, Any

import ray
from ray.llm._internal.common.callbacks.base import CallbackBase

from weightstream.errors import UsageError
from weightstream.log import get_logger

if TYPE_CHECKING:
    from weightstream.serve_integration.nodes import Warming

log = get_logger(__name__)


class MountedModel(CallbackBase):  # type: ignore[misc]  # Ray's has no types
    """Downloads nothing; prefetches `uri`, which the mount shows at `model_source`.

    An LLMConfig names it in `callback_config`, with `{"uri": "s3://..."}` as `callback_kwargs`.
    """

    def __init__(self, *args: Any, uri: str, **kwargs: Any) -> None:
        if "://" not in uri:
            raise UsageError(f"{uri!r} is no URI of a model: s3://bucket/model")
        super().__init__(*args, **kwargs)
        self.uri = uri
        self.warming: Warming | None = None
        """How far the nodes are. The engine does not wait for it: reads wait for their bytes."""

    async def on_before_node_init(self) -> None:
        """Take the download out of the start, and begin to prefetch."""
        from weightstream.serve_integration.nodes import warm

        self.ctx.run_init_node = False
        nodes = nodes_of(self.ctx.placement_group)
        self.warming = warm(self.uri, nodes)
        log.info("%d nodes prefetch %s; serve.llm downloads nothing", len(nodes), self.uri)


def nodes_of(placement_group: Any) -> list[str]:
    """Return the ids of the nodes that a replica's placement group is on; else of this one."""
    if placement_group is None:
        return [ray.get_runtime_context().get_node_id()]
    bundles = ray.util.placement_group_table(placement_group)["bundles_to_node_id"]
    return sorted(set(bundles.values()))
