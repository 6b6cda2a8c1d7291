"""Many models per replica, loaded on demand: the header `serve_multiplexed_model_id: 3` picks one.

The replica keeps two. A third pushes out the one used longest ago, whose memory is given back.
"""

from ray import serve
from starlette.requests import Request

from examples.models import uri
from examples.shift import Shift
from weightstream.serve import aload_model


@serve.deployment(ray_actor_options={"num_cpus": 0.2})
class Multiplexed:
    """Answers with the model that a request names."""

    @serve.multiplexed(max_num_models_per_replica=2)
    async def model(self, key: str) -> Shift:
        """Load a model."""
        return await aload_model(Shift, uri(key))

    async def __call__(self, request: Request) -> str:
        """Shift `text` by the key that the request names."""
        model = await self.model(serve.get_multiplexed_model_id())
        return model.text(request.query_params["text"])


app = Multiplexed.bind()
