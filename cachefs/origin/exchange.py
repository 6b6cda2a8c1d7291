"""One request and its answer on one connection."""

from __future__ import annotations

from http.client import HTTPException, HTTPResponse
from types import TracebackType
from typing import TYPE_CHECKING

from weightstream.cachefs.origin.connections import Connection, Pool
from weightstream.cachefs.origin.receive import receive
from weightstream.cachefs.origin.responses import REDIRECTS, Answer, Asked
from weightstream.cachefs.origin.urls import Url
from weightstream.errors import ProtocolError

if TYPE_CHECKING:
    from weightstream.cachefs.fetch.source import Transfer

SMALL_BODY_BYTES = 64 << 10


class Exchange:
    """Owns a connection from the request until the answer is read.

    On exit the connection goes back to the pool if the answer was read to its last byte, and is
    closed otherwise: what is left in the socket would be taken for the next answer.
    """

    def __init__(
        self, pool: Pool, connection: Connection, response: HTTPResponse, url: Url, asked: Asked
    ) -> None:
        self.url = url
        self.asked = asked
        self._pool = pool
        self._connection = connection
        self._response = response
        self._complete = False

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back, or close it."""
        reusable = self._complete and not self._response.will_close
        self._response.close()
        if reusable:
            self._pool.give_back(self._connection)
        else:
            self._connection.close()

    def head(self) -> Answer:
        """Return status and headers."""
        response = self._response
        return Answer(self.url, response.status, response.reason, response.headers)

    def small_answer(self, limit: int = SMALL_BODY_BYTES) -> Answer:
        """Return status, headers and the first `limit` bytes of the body."""
        response = self._response
        try:
            body = response.read(limit)
            self._complete = response.isclosed()
        except (OSError, HTTPException):
            if response.status < 300:
                raise
            body = b""  # the status of a refusal says enough
        return Answer(self.url, response.status, response.reason, response.headers, body)

    def redirect(self) -> Url | None:
        """Return where the answer sends the client instead."""
        location = self._response.headers.get("Location")
        if self._response.status not in REDIRECTS or not location:
            return None
        target = self.url.join(location)
        if self.url.scheme == "https" and target.scheme != "https":
            raise _final(ProtocolError(self.asked.says("redirected from https to http: refused")))
        return target

    def read_body(self, into: memoryview, transfer: Transfer) -> None:
        """Read the body, exactly as long as `into`, straight into it."""
        # What came in one segment with the headers lies in the parser's buffer (8 KiB at most).
        early = self._response.fp.peek(1)
        count = min(len(early), len(into))
        into[:count] = early[:count]
        done = receive(self._connection.sock, into, count, transfer)
        if done < len(into):
            cause = f"the connection closed after {done} of {len(into)} bytes"
            raise ProtocolError(self.asked.says(cause))
        self._complete = len(early) == count


def _final(error: ProtocolError) -> ProtocolError:
    error.transient = False
    return error
