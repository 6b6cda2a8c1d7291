"""One model, loaded in the constructor: `curl localhost:8000/?text=abc` answers `bcd`."""

from ray import serve
from starlette.requests import Request

from examples.models import uri
from weightstream.serve import load_model, prefetch


@serve.deployment(ray_actor_options={"num_cpus": 0.2})
class Plain:
    """Answers with one model."""

    def __init__(self) -> None:
        prefetch(uri(1))  # from here on the weights come, whatever is imported meanwhile
        from examples.shift import Shift

        self.model = load_model(Shift, uri(1))

    def __call__(self, request: Request) -> str:
        """Shift `text`."""
        return self.model.text(request.query_params["text"])


app = Plain.bind()
