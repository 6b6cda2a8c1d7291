"""What the control API can do; see docs/AGENT.md."""

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from weightstream import __version__
from weightstream.cachefs.agent.fills import Prefetch
from weightstream.cachefs.agent.held import held
from weightstream.cachefs.agent.node import Agent
from weightstream.cachefs.agent.peering import PeeringStatus
from weightstream.cachefs.fuse.mount_table import canonical, is_under, mount_of
from weightstream.cachefs.fuse.mounts import RunDirectory
from weightstream.cachefs.fuse.supervisor.overview import READY, MountRow, overview
from weightstream.cachefs.store.info import is_under as lies_under
from weightstream.errors import MountError, StoreError, UsageError, WeightstreamError
from weightstream.log import mask_secrets

_Result = TypeVar("_Result")

_THREADS = 8
_SLOW_THREADS = 2
_TELL_EVERY_S = 0.1
_WRITE_S = 30.0
_REFRESH_S = 900.0
_MOST_MODELS = 256


@dataclass(frozen=True, slots=True)
class ApiAddress:
    """Where the API answers over TCP, and the token that it asks for there; port 0: nowhere."""

    host: str
    port: int
    token: str


class Routes:
    """The handlers; all but the streams answer with one JSON document."""

    def __init__(self, agent: Agent, directories: tuple[str, ...], api: ApiAddress) -> None:
        self._agent = agent
        self._api = api
        self._directories = tuple(canonical(one) for one in directories)
        self._run = RunDirectory(agent.settings.run_directory)
        name = "weightstream-control"
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix=name)
        # To list a large mount again takes minutes: probes must not wait behind that.
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, thread_name_prefix=name)

    def register(self, app: web.Application) -> None:
        """Add the handlers to an application."""
        app.router.add_get("/healthz", self.healthz)
        app.router.add_get("/readyz", self.readyz)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/status", self.status)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/api", self.api)
        for name in ("prefetch", "pin", "unpin", "evict", "drain", "refresh"):
            app.router.add_post(f"/v1/{name}", getattr(self, name))

    def close(self) -> None:
        """Take on nothing new; what waits for a disk or a mount is left to end by itself."""
        for pool in (self._threads, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)

    # Looking

    async def healthz(self, request: web.Request) -> web.Response:
        """Say that the agent lives."""
        return web.json_response({"ok": True})

    async def readyz(self, request: web.Request) -> web.Response:
        """Say whether its mounts are there and its peers have been heard."""
        lacking = await self._aside(self._lacking)
        return web.json_response({"ready": not lacking}, status=503 if lacking else 200)

    async def metrics(self, request: web.Request) -> web.Response:
        """Return every metric of this process, for Prometheus."""
        body = await self._aside(generate_latest)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def status(self, request: web.Request) -> web.Response:
        """Return what the agent has and does."""
        return web.json_response(await self._aside(self._status))

    def _status(self) -> dict[str, Any]:
        agent = self._agent
        peering = agent.peering
        return {
            "version": __version__,
            "uptime_s": round(time.time() - agent.started_s, 1),
            "draining": agent.draining,
            "waits_for": self._lacking(),
            "connections": agent.connections,
            "origins": agent.origins.roots(),
            "store": self._store(),
            "mounts": [asdict(row) for row in self._mounts()],
            "peers": asdict(peering.status()) if peering is not None else None,
            "fills": [_progress(job) | {"uri": job.uri} for job in agent.prefetches.running()],
        }

    async def models(self, request: web.Request) -> web.Response:
        """Return how much of some models is in the store."""
        uris = request.query.getall("uri", [])
        if not 1 <= len(uris) <= _MOST_MODELS or not all(uris):
            raise UsageError(f"name 1 to {_MOST_MODELS} models: ?uri=s3://...&uri=s3://...")
        found = await self._aside(lambda: held(self._agent.store, uris))
        return web.json_response({"models": [asdict(one) for one in found]})

    async def api(self, request: web.Request) -> web.Response:
        """Say where the API is over TCP, with its token: on the unix socket only.

        Who may connect there may read the agent's memory, too.
        """
        return web.json_response(asdict(self._api))

    def _store(self) -> dict[str, Any]:
        store = self._agent.store
        infos = list(store.blobs())
        return {
            "path": str(store.path),
            "usage_bytes": store.usage_bytes(),
            "room_bytes": max(0, store.room_bytes()),
            "files": len(infos),
            "complete": sum(info.complete for info in infos),
        }

    def _mounts(self) -> list[MountRow]:
        return overview(self._run)

    def _lacking(self) -> list[str]:
        """Return what the agent still waits for before it is ready."""
        lacking = []
        if self._directories:
            ready = {row.directory for row in self._mounts() if row.state == READY}
            lacking = [f"mount {one}" for one in self._directories if one not in ready]
        peering = self._agent.peering
        state = PeeringStatus() if peering is None else peering.status()
        return lacking if state.settled else [*lacking, "peers"]

    # Doing

    async def prefetch(self, request: web.Request) -> web.StreamResponse:
        """Bring a model into the store; stream progress, one JSON document a line.

        Two requests for one URI share one job; it ends when nobody waits for it any more.
        """
        given = await _body(request, {"uri": str}, {"store": str})
        wanted = given.get("store") or str(self._agent.store.path)
        if wanted != str(self._agent.store.path):
            raise StoreError(f"the agent's store is {self._agent.store.path}, not {wanted}")
        job = self._agent.prefetches.join(given["uri"])
        try:
            return await self._stream(request, job)
        finally:
            self._agent.prefetches.leave(job)

    async def _stream(self, request: web.Request, job: Prefetch) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        while not job.done.is_set():
            await _send(response, {"event": "progress", **_progress(job)})
            await asyncio.sleep(_TELL_EVERY_S)
        if job.report is not None:
            await _send(response, {"event": "done", **asdict(job.report)})
        else:
            error = job.error or WeightstreamError("the prefetch ended without a word")
            await _send(response, {"event": "failed", **error_of(error)})
        await response.write_eof()
        return response

    async def pin(self, request: web.Request) -> web.Response:
        """Keep a model from being evicted."""
        return await self._pin(request, pinned=True)

    async def unpin(self, request: web.Request) -> web.Response:
        """Let a model be evicted again."""
        return await self._pin(request, pinned=False)

    async def _pin(self, request: web.Request, *, pinned: bool) -> web.Response:
        uri = (await _body(request, {"uri": str}))["uri"]
        count = await self._aside(lambda: self._agent.store.pin(uri, pinned))
        if not count:
            raise StoreError(f"nothing under {uri} is in the store {self._agent.store.path}")
        return web.json_response({"files": count})

    async def evict(self, request: web.Request) -> web.Response:
        """Remove a model, or the least recently used until so many bytes would fit."""
        given = await _body(request, {}, {"uri": str, "free_bytes": int})
        if len(given) > 1 or given.get("free_bytes", 0) < 0:
            raise UsageError("give one of uri and free_bytes")
        removed = await self._aside(lambda: self._evict(given))
        return web.json_response(removed)

    def _evict(self, given: dict[str, Any]) -> dict[str, int]:
        store = self._agent.store
        if "uri" in given:
            uri = given["uri"]
            if not uri or not any(lies_under(info.blob.uri, uri) for info in store.blobs()):
                raise StoreError(f"nothing under {uri!r} is in the store {store.path}")
            removed = store.remove(uri)
        else:
            removed = store.evict(given.get("free_bytes", 0))
        freed = sum(info.allocated_bytes for info in removed)
        return {"files": len(removed), "bytes": freed}

    async def drain(self, request: web.Request) -> web.Response:
        """Serve peers nothing new, before the node goes away."""
        await self._aside(self._agent.drain)
        return web.json_response({"draining": True})

    async def refresh(self, request: web.Request) -> web.Response:
        """Have a mount, or a folder of one, look at its origin again."""
        path = (await _body(request, {"path": str}))["path"]
        loop = asyncio.get_running_loop()
        folders = await loop.run_in_executor(self._slow, self._refresh, path)
        return web.json_response({"folders": folders})

    def _refresh(self, path: str) -> int:
        found = mount_of(path)
        if found is None or not path.startswith("/") or not is_under(path, found.directory):
            raise MountError(f"{path} is not in a mount of weightstream")
        inside = path[len(found.directory) :].strip("/")
        question = {"command": "refresh", "path": inside}
        try:
            answer = self._run.ask(found.directory, question, _REFRESH_S)
        except (ConnectionError, TimeoutError) as error:
            raise MountError(f"the mount of {found.directory} does not answer") from error
        return int(answer.get("folders", 0))

    async def _aside(self, work: Callable[[], _Result]) -> _Result:
        """Do what may wait on another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


async def _body(
    request: web.Request, needed: dict[str, type], optional: dict[str, type] | None = None
) -> dict[str, Any]:
    """Return a request's JSON object; raises `UsageError` for anything else."""
    known = needed | (optional or {})
    text = await request.text()
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise UsageError("the body is not JSON") from error
    if not isinstance(given, dict):
        raise UsageError("the body is not a JSON object")
    for name, value in given.items():
        if name not in known:
            raise UsageError(f"unknown field {name[:80]!r}")
        if type(value) is not known[name]:
            raise UsageError(f"{name} must be {known[name].__name__}")
    for name in needed:
        if not given.get(name):
            raise UsageError(f"{name} is missing")
    return given


async def _send(response: web.StreamResponse, message: dict[str, Any]) -> None:
    """Send a line; a client that does not read is not waited for for ever."""
    try:
        await asyncio.wait_for(response.write(json.dumps(message).encode() + b"\n"), _WRITE_S)
    except TimeoutError as error:
        raise ConnectionResetError("the client reads nothing") from error


def _progress(job: Prefetch) -> dict[str, Any]:
    return asdict(job.progress) if job.progress is not None else {}


def error_of(error: WeightstreamError) -> dict[str, Any]:
    """Return what clients are told of an error."""
    text = mask_secrets(" ".join(str(error).split()))
    return {"error": text, "kind": type(error).__name__, "exit_code": error.exit_code}
