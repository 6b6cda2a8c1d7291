"""The deployments that are compared: the same module, loaded in two ways.

An answer touches a row of every layer, so a replica that answers has its weights.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from weightstream.bench.serve.traffic import LAST_LINE

if TYPE_CHECKING:
    from torch import nn


class _Answering:
    model: "nn.Module"

    def __call__(self) -> dict[str, object]:
        import ray
        from ray import serve

        context = serve.get_replica_context()
        return {
            "replica": context.replica_id.unique_id,
            "node": ray.get_runtime_context().get_node_id(),
            "sum": float(sum(weight[0].sum().item() for weight in self.model.parameters())),
            "init_s": self.init_s,
            "pid": os.getpid(),
        }

    init_s = 0.0


class Streamed(_Answering):
    """Weights by weightstream."""

    def __init__(self, uri: str) -> None:
        from weightstream.bench.serve.model import build
        from weightstream.serve_integration import load_model

        began_s = time.monotonic()
        self.model = load_model(build, uri)
        self.init_s = time.monotonic() - began_s


class Downloaded(_Answering):
    """Weights by s3fs into a local folder, then safetensors: what many deployments do."""

    def __init__(self, uri: str) -> None:
        import s3fs
        import torch
        from safetensors.torch import load_file

        from weightstream.bench.serve.model import build

        began_s = time.monotonic()
        with torch.device("meta"):
            self.model = build()
        with tempfile.TemporaryDirectory() as folder:
            s3fs.S3FileSystem().get(uri.rstrip("/") + "/", folder + "/", recursive=True)
            for file in sorted(Path(folder).rglob("*.safetensors")):
                self.model.load_state_dict(load_file(file), strict=False, assign=True)
        self.init_s = time.monotonic() - began_s


class Serving:
    """What is moved: short answers of 20 ms, and streams of 3 s.

    Another `version` makes Serve replace all replicas.
    """

    def __init__(self, uri: str, version: str) -> None:
        from weightstream.bench.serve.model import build
        from weightstream.serve_integration import load_model

        self.model = load_model(build, uri)
        self.version = version

    async def __call__(self, request: Request) -> Response:
        """Answer in the way that the query asks for."""
        if request.query_params.get("stream") == "1":
            return StreamingResponse(self._lines(), media_type="text/plain")
        await asyncio.sleep(0.02)
        return PlainTextResponse(LAST_LINE)

    async def _lines(self) -> AsyncIterator[str]:
        for line in range(10):
            await asyncio.sleep(0.3)
            yield f"{line}\n"
        yield LAST_LINE
