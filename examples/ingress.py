"""Behind FastAPI, another model version in place: `curl localhost:8000/shift/abc`.

A new `user_config` in the config file reloads the weights; the old ones answer until they are here,
and go on when they cannot be loaded.
"""

from fastapi import FastAPI
from ray import serve

from examples.models import uri
from examples.shift import Shift
from weightstream.serve import Reloadable

api = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.2}, user_config={"key": 1})
@serve.ingress(api)
class Reloading:
    """Answers with the version that the configuration names."""

    def __init__(self) -> None:
        self.model = Reloadable(Shift)

    async def reconfigure(self, user_config: dict[str, int]) -> None:
        """Load the version of a new configuration."""
        await self.model.follow(uri(user_config["key"]))

    @api.get("/shift/{text}")
    def shift(self, text: str) -> str:
        """Shift `text`."""
        return self.model.module.text(text)


app = Reloading.bind()
