"""Applications of these tests, in a module that replicas import."""

import gc
import logging
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from examples.models import uri
from examples.shift import Shift
from ray import serve
from starlette.requests import Request

from weightstream.errors import UsageError
from weightstream.serve import aload_model, load_model

LAYERS = 4


class Layers(torch.nn.Module):
    """What `tests.kit.models.plain(LAYERS * 4 * size, LAYERS)` holds."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = torch.nn.ModuleList([_Layer(size) for _ in range(LAYERS)])

    def digest(self) -> str:
        """Return a name for the very bits of all parameters."""
        return digest_of({name: tensor for name, tensor in self.named_parameters()})


class _Layer(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size))


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """Return a name for names and bits."""
    state = blake3()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Digest:
    """Answers with the digest of its model."""

    def __init__(self, model: str, size: int) -> None:
        self.model = load_model(lambda: Layers(size), model)

    def __call__(self, _: Request) -> str:
        """Return the digest."""
        return self.model.digest()


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Few:
    """Keeps two models, and says how many are in its memory."""

    @serve.multiplexed(max_num_models_per_replica=2)  # type: ignore[untyped-decorator]
    async def model(self, key: str) -> Shift:
        """Load a model."""
        return await aload_model(Shift, uri(key))

    async def __call__(self, request: Request) -> str:
        """Shift `text`; and count."""
        model = await self.model(serve.get_multiplexed_model_id())
        text = model.text(request.query_params["text"])
        del model
        gc.collect()
        alive = sum(isinstance(one, Shift) for one in gc.get_objects())
        return f"{text} {alive}"


@serve.deployment(ray_actor_options={"num_cpus": 0})
class OtherRay:
    """Runs with a Ray that has renamed what this package reads of a replica."""

    def __init__(self) -> None:
        self.said: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("weightstream").addHandler(handler)

        class Renamed:
            """Has none of the names."""

        real: Any = serve.get_replica_context
        serve.get_replica_context = lambda: Renamed()
        try:
            self.models = [load_model(Shift, uri(key)) for key in (1, 2)]
        finally:
            serve.get_replica_context = real

    def __call__(self, request: Request) -> list[str]:
        """Shift `text` by both, and say what was warned of."""
        text = request.query_params["text"]
        return [*(model.text(text) for model in self.models), *self.said]


def session_logs(session: Path) -> str:
    """Return what all replicas of a cluster have logged."""
    return "".join(one.read_text() for one in (session / "logs" / "serve").glob("replica_*.log"))


def try_to_load(device: str | None) -> str:
    """Load where this worker's resources say; return an answer, or why there is none."""
    try:
        return load_model(Shift, uri(1), device=device).text("abc")
    except UsageError as error:
        return str(error)
