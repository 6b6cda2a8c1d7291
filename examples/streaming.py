"""An answer that comes letter by letter: `curl -N localhost:8000/?text=abc`."""

from collections.abc import AsyncIterator

from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

from examples.models import uri
from examples.shift import Shift
from weightstream.serve import load_model


@serve.deployment(ray_actor_options={"num_cpus": 0.2})
class Streaming:
    """Answers with one model, piece by piece."""

    def __init__(self) -> None:
        self.model = load_model(Shift, uri(1))

    async def letters(self, text: str) -> AsyncIterator[str]:
        """Shift one letter after the other."""
        for letter in text:
            yield self.model.text(letter)

    def __call__(self, request: Request) -> StreamingResponse:
        """Begin to answer."""
        return StreamingResponse(
            self.letters(request.query_params["text"]), media_type="text/plain"
        )


app = Streaming.bind()
