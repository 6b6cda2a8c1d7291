"""`weightstream tracker`: tells members of each other, and BitTorrent peers too.

    POST /v1/members  {node, host, port, zone}    registers for 15 s; the answer lists everybody
    GET  /v1/members?wait=<epoch>&seconds=<n>     the same list, once it is of another epoch
    GET  /announce, /scrape                       BitTorrent
    GET  /announce/<key>, or /announce?key=<key>  the same where there is a secret

Everything it knows is soft: after a restart the nodes have told it again within five seconds, and a
cluster whose tracker is gone goes on with the members that it had.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from weightstream.errors import UsageError
from weightstream.p2p.identity import MOST_ZONE_CHARACTERS, ClusterKeys, Signer, is_node_name
from weightstream.p2p.members.addresses import is_host, is_port
from weightstream.p2p.members.registry import TTL_S, Entry, Registry
from weightstream.p2p.members.swarms import (
    AnnounceError,
    Bencoded,
    Swarms,
    bencode,
    parse_announce,
    parse_hashes,
    parse_query,
)
from weightstream.p2p.members.tracked import MEMBERS_PATH

log = logging.getLogger(__name__)

_MOST_WAIT_S = 20.0
_MOST_BODY_BYTES = 16 << 10
_BODY_S = 5.0
_IDLE_S = 30.0  # also for a head that never ends
_MOST_CONNECTIONS = 4096
_SWEEP_S = 1.0
_START_S = 10.0
_END_S = 5.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def announce_key(keys: ClusterKeys | None) -> str:
    """Return what announces carry as key; empty without a secret."""
    return keys.key("tracker").hex() if keys else ""


def announce_url(tracker: str, keys: ClusterKeys | None) -> str:
    """Return what a torrent names as its tracker; `tracker` is http(s)://host:port.

    The key is in the path: measured, libtorrent 2.1 by default asks no tracker in a local network
    whose URL has a query. Who gets the torrent gets the key; it opens nothing but announces.
    """
    key = announce_key(keys)
    return f"{tracker.rstrip('/')}/announce" + (f"/{key}" if key else "")


class _State:
    """What the handlers share; on the loop's thread only."""

    def __init__(self, keys: ClusterKeys | None) -> None:
        # random, so that nobody takes a restarted tracker's epoch for one it knows
        self.registry = Registry(secrets.randbits(48))
        self.swarms = Swarms()
        self.signer = Signer(keys.key("requests"), "tracker") if keys else None
        self.key = announce_key(keys).encode()
        self.changed = asyncio.Event()

    def wake(self) -> None:
        """Answer everybody who waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    def listing(self) -> web.Response:
        members = [
            {"node": e.node, "host": e.host, "port": e.port, "zone": e.zone}
            for e in self.registry.entries()
        ]
        return _json({"epoch": self.registry.epoch, "ttl_s": TTL_S, "members": members})

    # The handlers

    async def register(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(_BODY_S):
                entry = _parse_entry(await request.read())
        except TimeoutError:
            return _refusal(408, "the body came too slowly")
        except web.HTTPRequestEntityTooLarge:
            return _refusal(413, f"a body has {_MOST_BODY_BYTES} bytes at most")
        except ValueError as error:
            return _refusal(400, str(error))
        if self.registry.register(entry, time.monotonic()):
            log.info("%s is at %s:%d", entry.node, entry.host, entry.port)
            self.wake()
        return self.listing()

    async def members(self, request: web.Request) -> web.Response:
        try:
            known = int(request.query.get("wait", "-1"))
            wait_s = float(request.query.get("seconds", _MOST_WAIT_S))
        except ValueError:
            return _refusal(400, "wait and seconds are numbers")
        deadline_s = time.monotonic() + (min(wait_s, _MOST_WAIT_S) if wait_s > 0 else 0.0)
        while known == self.registry.epoch and (left_s := deadline_s - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):  # no change is an answer, too
                await asyncio.wait_for(self.changed.wait(), left_s)
        return self.listing()

    async def announce(self, request: web.Request) -> web.Response:
        return self._torrent(request, self._announce)

    async def scrape(self, request: web.Request) -> web.Response:
        return self._torrent(request, lambda fields, _: self.swarms.scrape(parse_hashes(fields)))

    def _announce(self, fields: dict[str, list[bytes]], sender: str) -> Any:
        said = parse_announce(fields, sender, trusts_ip=bool(self.key))
        return self.swarms.announce(said, time.monotonic())

    def _torrent(
        self, request: web.Request, act: Callable[[dict[str, list[bytes]], str], Any]
    ) -> web.Response:
        """Answer in BitTorrent's manner: 200, and what is wrong inside."""
        try:
            fields = parse_query(request.raw_path.partition("?")[2])
            # clients add a `key` of their own, to be known by at another address: any may fit
            keys = [
                *fields.get("key", ()),
                request.match_info.get("key", "").encode("utf-8", "replace"),
            ]
            if self.key and not any(hmac.compare_digest(self.key, key) for key in keys):
                raise AnnounceError("the key is wrong")
            answer: Bencoded = act(fields, request.remote or "")
        except AnnounceError as error:
            answer = {b"failure reason": str(error).encode()}
        return web.Response(body=bencode(answer), content_type="text/plain")

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.signer is None or not request.path.startswith("/v1/"):
            return await handler(request)
        header = request.headers.get("Authorization")
        refusal = self.signer.refusal(header, request.method, request.raw_path)
        if refusal is None:
            return await handler(request)
        log.info("refused a request from %s: %s", request.remote, refusal)
        return _refusal(401, refusal)

    async def sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            if self.registry.expire(time.monotonic()):
                self.wake()
            self.swarms.expire(time.monotonic())


class Tracker:
    """A tracker on a thread of its own; listens when made, close it.

    Raises `UsageError` when the address cannot be listened at.
    """

    def __init__(self, host: str, port: int, keys: ClusterKeys | None) -> None:
        self.host = host
        self.port = port
        self._keys = keys
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="peers-tracker")
        self._thread.start()
        self._started.wait(_START_S)
        if isinstance(self._error, OSError):
            cause = self._error.strerror or self._error
            raise UsageError(f"cannot listen at {host}:{port}: {cause}") from self._error
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Answer nobody any more."""
        with contextlib.suppress(RuntimeError):  # the loop ended before
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(_END_S)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            if self._started.is_set():
                log.exception("the tracker ended")
            self._error = error
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        state = _State(self._keys)
        app = web.Application(client_max_size=_MOST_BODY_BYTES, middlewares=[state.guard])
        app.router.add_post(MEMBERS_PATH, state.register)
        app.router.add_get(MEMBERS_PATH, state.members)
        for path, handler in (("/announce", state.announce), ("/scrape", state.scrape)):
            app.router.add_get(path, handler)
            app.router.add_get(f"{path}/{{key}}", handler)
        runner = web.AppRunner(
            app, access_log=None, keepalive_timeout=_IDLE_S, lingering_time=0.0,
            shutdown_timeout=0.5, handler_cancellation=True,
        )  # fmt: skip
        await runner.setup()
        sweep = asyncio.create_task(state.sweep())
        try:
            server = runner.server
            assert server is not None
            bounded = _bounded(server)
            listener = await self._loop.create_server(bounded, self.host or None, self.port)
            self.port = int(listener.sockets[0].getsockname()[1])
            self._started.set()
            await self._end.wait()
            listener.close()
            state.wake()
        finally:
            sweep.cancel()
            await runner.cleanup()


def _bounded(server: web.Server) -> Callable[[], asyncio.BaseProtocol]:
    """Return a server's protocols, and nothing but closed doors beyond so many connections."""

    def make() -> asyncio.BaseProtocol:
        return server() if len(server.connections) < _MOST_CONNECTIONS else _Closed()

    return make


class _Closed(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _parse_entry(body: bytes) -> Entry:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the body is no JSON") from error
    if not isinstance(found, dict) or not is_node_name(found.get("node")):
        raise ValueError("node is a node's name")
    host, port, zone = found.get("host"), found.get("port"), found.get("zone", "")
    if not is_host(host) or not is_port(port):
        raise ValueError("host and port are where the node is reached")
    if not isinstance(zone, str) or len(zone) > MOST_ZONE_CHARACTERS or not zone.isprintable():
        raise ValueError("zone is a name")
    return Entry(found["node"], str(host), int(str(port)), zone)


def _json(value: object) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), content_type="application/json")


def _refusal(status: int, cause: str) -> web.Response:
    return web.Response(status=status, text=cause)
