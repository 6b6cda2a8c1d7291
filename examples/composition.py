"""Two models in a row: one shifts by 1, the next one back, so the answer is the question."""

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from examples.models import uri
from examples.shift import Shift
from weightstream.serve import load_model


@serve.deployment(ray_actor_options={"num_cpus": 0.2})
class Stage:
    """Answers with one model of the row."""

    def __init__(self, key: int) -> None:
        self.model = load_model(Shift, uri(key), dtype="bfloat16")

    def __call__(self, text: str) -> str:
        """Shift `text`."""
        return self.model.text(text)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Row:
    """Passes a text through both."""

    def __init__(self, there: DeploymentHandle, back: DeploymentHandle) -> None:
        self.there, self.back = there, back

    async def __call__(self, request: Request) -> str:
        """Shift `text` there and back."""
        return await self.back.remote(self.there.remote(request.query_params["text"]))


app = Row.bind(Stage.options(name="There").bind(1), Stage.options(name="Back").bind(25))
