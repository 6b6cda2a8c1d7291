"""The agent's control API over HTTP: on a unix socket for this user, with a token on TCP.

An event loop on a thread of its own; what may wait for a disk, an origin or a mount runs on a few
other threads, so that neither a slow client nor a hung mount holds up who else asks. The data plane
shares nothing with it but the interpreter lock.
"""

import asyncio
import hmac
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from aiohttp import web

from weightstream.cachefs.agent import wire
from weightstream.cachefs.agent.finding import CONTROL_SOCKET
from weightstream.cachefs.agent.node import Agent
from weightstream.cachefs.agent.routes import ApiAddress, Routes, error_of
from weightstream.cachefs.agent.server import listen
from weightstream.errors import (
    AccessDeniedError,
    MountError,
    NotFoundError,
    OriginError,
    StoreError,
    StoreFullError,
    UsageError,
    WeightstreamError,
)

log = logging.getLogger(__name__)

_BODY_BYTES = 64 << 10
_START_S = 10.0
_CLOSE_S = 1.0
_OPEN = frozenset({"/healthz", "/readyz"})  # a probe has no token; they say yes or no
_LOCAL = "/v1/api"  # has the token in its answer

_STATUS: tuple[tuple[type[WeightstreamError], int], ...] = (
    (UsageError, 400),
    (AccessDeniedError, 403),
    (NotFoundError, 404),
    (StoreFullError, 507),
    (StoreError, 409),
    (MountError, 409),
    (OriginError, 502),
)


class _Demoted(logging.LoggerAdapter[logging.Logger]):
    """Where aiohttp says what is wrong with a client: nothing that concerns us."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log for debugging only."""
        super().log(logging.DEBUG, msg, *args, **kwargs)


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ControlServer:
    """Serves the API; `close` it."""

    def __init__(
        self, agent: Agent, directories: tuple[str, ...], api: tuple[str, int] | None, token: str
    ) -> None:
        """Raises `UsageError` when the TCP port cannot be had."""
        self._token = token
        listeners = [listen(agent.settings.run_directory, CONTROL_SOCKET)]
        if api is not None:
            listeners.append(_listen_tcp(*api))
        self.port = listeners[-1].getsockname()[1] if api is not None else 0
        host = api[0] if api is not None else ""
        self._routes = Routes(agent, directories, ApiAddress(host, self.port, token))
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        threading.Thread(
            target=self._loop.run_forever, daemon=True, name="weightstream-control"
        ).start()
        self._do(self._start(listeners), _START_S)

    def close(self) -> None:
        """End every request; returns in about a second."""
        self._routes.close()
        try:
            self._do(self._stop(), 2 * _CLOSE_S)
        except TimeoutError:
            log.debug("requests of the control API did not end in time")
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _do(self, work: Coroutine[Any, Any, None], limit_s: float) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(limit_s)

    async def _start(self, listeners: list[socket.socket]) -> None:
        @web.middleware
        async def guard(request: web.Request, handler: _Handler) -> web.StreamResponse:
            return await self._guard(request, handler)

        app = web.Application(client_max_size=_BODY_BYTES, middlewares=[guard, _translate])
        self._routes.register(app)
        runner = self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, handler_cancellation=True,
            shutdown_timeout=_CLOSE_S, keepalive_timeout=30.0, logger=_Demoted(log, {}),
        )  # fmt: skip
        await runner.setup()
        for listener in listeners:
            await web.SockSite(runner, listener).start()

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Let in whom the socket vouches for, and who has the token."""
        sock = request.transport.get_extra_info("socket") if request.transport else None
        if sock is None:
            raise web.HTTPForbidden
        if sock.family == socket.AF_UNIX:
            allowed = wire.is_trusted(wire.peer(sock)[1])
        else:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            allowed = hmac.compare_digest(given, f"Bearer {self._token}".encode())
            allowed = allowed and request.path != _LOCAL
        if not allowed and request.path not in _OPEN:
            return _failure("a token is needed", 401, {"WWW-Authenticate": "Bearer"})
        return await handler(request)


@web.middleware
async def _translate(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer errors in JSON: `{"error": ..., "kind": ..., "exit_code": ...}`."""
    try:
        return await handler(request)
    except WeightstreamError as error:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
        return web.json_response(error_of(error), status=status)
    except web.HTTPException as error:
        return _failure(error.reason, error.status, {})
    except ConnectionError:  # the client is gone; aiohttp knows what to do
        raise
    except Exception as error:  # a bug: whoever asked must hear of it
        log.exception("unexpected, answering %s %s", request.method, request.path)
        return _failure(f"internal error: {error!r}", 500, {})


def _failure(text: str, status: int, headers: dict[str, str]) -> web.Response:
    return web.json_response({"error": text}, status=status, headers=headers)


def _listen_tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UsageError(f"cannot serve the API on {host}:{port}: {error.strerror}") from error
