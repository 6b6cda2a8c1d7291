"""Requests answered together: what arrives within 10 ms goes through the model once."""

import torch
from ray import serve
from starlette.requests import Request

from examples.models import uri
from examples.shift import Shift
from weightstream.serve import load_model


@serve.deployment(ray_actor_options={"num_cpus": 0.2}, max_ongoing_requests=100)
class Batching:
    """Answers with one model, many requests at a time."""

    def __init__(self) -> None:
        self.model = load_model(Shift, uri(1))

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.01)
    async def shift(self, texts: list[str]) -> list[str]:
        """Shift several texts in one pass."""
        codes = [torch.tensor(list(text.encode())) for text in texts]
        together = self.model(torch.cat(codes)).split([len(one) for one in codes])
        return [bytes(one.tolist()).decode() for one in together]

    async def __call__(self, request: Request) -> str:
        """Shift `text`."""
        return await self.shift(request.query_params["text"])


app = Batching.bind()
