"""Asking this node's agent over its control socket, for whoever would else do it by itself."""

import json
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from weightstream import errors
from weightstream.cachefs.agent import wire
from weightstream.cachefs.agent.finding import CONTROL_SOCKET
from weightstream.cachefs.fetch import Progress
from weightstream.cachefs.prefetch import PrefetchReport, ProgressCallback
from weightstream.cachefs.prefetch import prefetch as prefetch_here
from weightstream.cachefs.store import Store
from weightstream.errors import AccessDeniedError, LoadCancelled, WeightstreamError
from weightstream.settings import Settings

log = logging.getLogger(__name__)

_ANSWER_S = 30.0
"""An agent that says nothing for so long is not waited for; progress comes ten times a second."""

_LINE_BYTES = 4 << 20
_NO_HEADERS: Mapping[str, str] = {}


class NoAgent(Exception):
    """There is no agent, it ended meanwhile, or it cannot do this; do it without one."""


def prefetch(
    uri: str, settings: Settings, store: Store, progress: ProgressCallback | None = None
) -> PrefetchReport:
    """Have the agent bring a model into the store, or do it here where it cannot."""
    if settings.agent != "off" and settings.write_back == "on":
        try:
            return prefetch_there(uri, settings, progress)
        except NoAgent as error:
            log.info("prefetching %s without an agent: %s", uri, error)
    return prefetch_here(uri, settings, store, progress)


def prefetch_there(
    uri: str, settings: Settings, progress: ProgressCallback | None = None
) -> PrefetchReport:
    """Have the agent bring a model into the store; raises `NoAgent` or what went wrong there."""
    question = {"uri": uri, "store": str(settings.store)}
    return prefetch_over(_UnixConnection(settings.run_directory), question, progress)


def prefetch_over(
    connection: HTTPConnection,
    question: Mapping[str, str],
    progress: ProgressCallback | None = None,
    headers: Mapping[str, str] = _NO_HEADERS,
) -> PrefetchReport:
    """The same over any connection to an agent, which is closed; what `progress` raises ends it."""
    with _answer(connection, "POST", "/v1/prefetch", headers, json.dumps(question)) as answer:
        return _follow(answer, progress)


def status(directory: Path) -> Mapping[str, Any]:
    """Return what the agent of a run directory says of itself; raises `NoAgent`."""
    return get(_UnixConnection(directory), "/v1/status")


def api(directory: Path) -> Mapping[str, Any]:
    """Return where the agent of a run directory serves its API over TCP; raises `NoAgent`."""
    return get(_UnixConnection(directory), "/v1/api")


def get(
    connection: HTTPConnection, path: str, headers: Mapping[str, str] = _NO_HEADERS
) -> Mapping[str, Any]:
    """Return the answer of an agent, and close the connection; raises `NoAgent`."""
    with _answer(connection, "GET", path, headers) as answer:
        return wire.parse(answer.read(_LINE_BYTES))


@contextmanager
def _answer(
    connection: HTTPConnection,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: str | None = None,
) -> Iterator[HTTPResponse]:
    """Ask; `NoAgent` is what comes of a connection that fails, and of any answer but 200."""
    try:
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        if answer.status != 200:
            raise NoAgent(f"its agent says {answer.status}: {_text(answer)}")
        yield answer
    except WeightstreamError:  # some of them are OSError or ValueError, too
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise NoAgent(f"{type(error).__name__}: {error}") from error
    finally:
        connection.close()


class _UnixConnection(HTTPConnection):
    """HTTP over the agent's control socket."""

    def __init__(self, directory: Path) -> None:
        super().__init__("agent", timeout=_ANSWER_S)
        self._directory = directory

    def connect(self) -> None:
        """Connect; raises OSError when nobody listens there, or somebody else does."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_ANSWER_S)
        with wire.socket_address(self._directory, CONTROL_SOCKET) as path:
            self.sock.connect(path)
        pid, uid = wire.peer(self.sock)
        if not wire.is_trusted(uid):
            raise wire.WireError(f"process {pid} of user {uid} is not this user's agent")


def _follow(answer: HTTPResponse, progress: ProgressCallback | None) -> PrefetchReport:
    """Pass progress on until the end; raises what the agent says went wrong."""
    while line := answer.readline(_LINE_BYTES):
        message = wire.parse(line)
        event = message.pop("event", "")
        if event == "done":
            return PrefetchReport(**{**message, "unversioned": tuple(message["unversioned"])})
        if event == "failed":
            raise _error(message)
        if progress is not None and "bytes_total" in message:
            progress(Progress(**message))
    raise NoAgent("its agent ended")


def _error(message: Mapping[str, Any]) -> Exception:
    """Return the agent's error; `NoAgent` where this process may be able to do what it cannot."""
    text, kind = str(message.get("error")), getattr(errors, str(message.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, WeightstreamError)):
        kind = WeightstreamError
    if issubclass(kind, AccessDeniedError | LoadCancelled):  # other credentials; it is ending
        return NoAgent(text)
    return kind(text)


def _text(answer: HTTPResponse) -> str:
    try:
        return str(json.loads(answer.read(_LINE_BYTES)).get("error", ""))
    except (ValueError, AttributeError):
        return answer.reason
