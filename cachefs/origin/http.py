"""One ranged GET, read straight into the caller's memory; and small requests for the rest."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.origin.connections import Connection, Pool
from weightstream.cachefs.origin.exchange import SMALL_BODY_BYTES, Exchange
from weightstream.cachefs.origin.failures import translated
from weightstream.cachefs.origin.interrupt import Interrupt
from weightstream.cachefs.origin.responses import Answer, Asked, check_range, refusal
from weightstream.cachefs.origin.urls import Url
from weightstream.errors import LoadCancelled, ProtocolError

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

MAX_REDIRECTS = 5
_COMMON_HEADERS = {"User-Agent": "weightstream", "Accept-Encoding": "identity"}

# How a kept-alive connection dies that the server closed while it lay idle.
_STALE = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)

Authorize = Callable[[str, Url, dict[str, str]], Mapping[str, str]]
"""Returns the headers of a request with what proves who asks. Called for each hop of a redirect."""


def anonymous(method: str, url: Url, headers: dict[str, str]) -> Mapping[str, str]:
    """Authorize nothing."""
    return headers


@dataclass(frozen=True, slots=True)
class Request:
    """A request before it is authorized."""

    url: Url
    method: str = "GET"
    headers: Mapping[str, str] | None = None
    authorize: Authorize = anonymous

    def complete_headers(self) -> Mapping[str, str]:
        """Return every header but Host."""
        return self.authorize(self.method, self.url, {**_COMMON_HEADERS, **(self.headers or {})})


class Client:
    """The data plane of one origin. Thread-safe."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()

    def read_range(
        self, request: Request, asked: Asked, extent: Extent, into: memoryview, transfer: Transfer
    ) -> Answer:
        """Fill `into` with one range; return the head of the answer that gave it."""
        interrupt = Interrupt()
        transfer.on_cancel(interrupt.fire)
        headers = {**(request.headers or {}), "Range": f"bytes={extent.start}-{extent.stop - 1}"}
        try:
            with translated(asked):
                request = replace(request, headers=headers)
                return self._read_range(request, asked, extent, into, transfer, interrupt)
        except Exception as error:
            if interrupt.fired and not isinstance(error, LoadCancelled):
                raise LoadCancelled(asked.says("cancelled")) from error
            raise
        finally:
            transfer.on_cancel(None)

    def fetch(
        self,
        request: Request,
        asked: Asked,
        limit: int = SMALL_BODY_BYTES,
        hops: int = MAX_REDIRECTS,
        interrupt: Interrupt | None = None,
    ) -> Answer:
        """Make a small request and return its answer, whatever its status.

        With `hops=0` a redirect is an answer like any other. `interrupt` breaks it off.
        """
        interrupt = interrupt or Interrupt()
        with translated(asked), self._follow(request, asked, interrupt, hops) as exchange:
            try:
                return exchange.small_answer(limit)
            finally:
                interrupt.watch(None)

    def _read_range(
        self,
        request: Request,
        asked: Asked,
        extent: Extent,
        into: memoryview,
        transfer: Transfer,
        interrupt: Interrupt,
    ) -> Answer:
        with self._follow(request, asked, interrupt) as exchange:
            try:
                answer = exchange.head()
                if not answer.ok:
                    raise refusal(exchange.small_answer(), exchange.asked, time.time())
                check_range(answer, exchange.asked, extent)
                exchange.read_body(into, transfer)
                return answer
            finally:
                interrupt.watch(None)

    def _follow(
        self, request: Request, asked: Asked, interrupt: Interrupt, hops: int = MAX_REDIRECTS
    ) -> Exchange:
        """Send the request and follow redirects to the answer that counts."""
        for _ in range(hops + 1):
            exchange = self._send(request, asked, interrupt)
            try:
                target = exchange.redirect()
            except BaseException:
                exchange.close()
                raise
            if target is None or hops == 0:
                return exchange
            with exchange:
                exchange.small_answer()
            request = replace(request, url=target)
            asked = replace(asked, host=target.netloc)
        raise ProtocolError(asked.says(f"more than {hops} redirects"))

    def _send(self, request: Request, asked: Asked, interrupt: Interrupt) -> Exchange:
        headers = request.complete_headers()
        connection = self._pool.take(request.url)
        try:
            return self._ask(connection, request, headers, asked, interrupt)
        except _STALE:
            if not connection.reused or interrupt.fired:
                raise
        connection = self._pool.take(request.url, fresh=True)
        return self._ask(connection, request, headers, asked, interrupt)

    def _ask(
        self,
        connection: Connection,
        request: Request,
        headers: Mapping[str, str],
        asked: Asked,
        interrupt: Interrupt,
    ) -> Exchange:
        try:
            interrupt.watch(connection.sock)
            response = connection.ask(request.method, request.url, headers)
        except BaseException:
            interrupt.watch(None)
            connection.close()
            raise
        return Exchange(self._pool, connection, response, request.url, asked)
