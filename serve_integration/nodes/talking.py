"""Asking the agents of other nodes, over TCP with their tokens. Blocks; needs no Ray."""

from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlencode

from weightstream.cachefs.agent import asking
from weightstream.cachefs.agent.asking import NoAgent
from weightstream.cachefs.agent.held import Held
from weightstream.cachefs.fetch import Progress
from weightstream.cachefs.prefetch import PrefetchReport
from weightstream.serve_integration.registry import Agent

__all__ = ["NoAgent", "held_by", "prefetch_by", "status_of"]

SILENCE_S = 30.0
"""An agent that says nothing for so long is given up; in a prefetch it speaks often."""

_LOOK_S = 3.0


def status_of(agent: Agent, limit_s: float = _LOOK_S) -> Mapping[str, Any]:
    """Return what an agent says of itself; raises `NoAgent`, which names it."""
    return _get(agent, "/v1/status", limit_s)


def held_by(agent: Agent, uris: Sequence[str], limit_s: float = _LOOK_S) -> dict[str, Held]:
    """Return what an agent's store holds of some models; raises `NoAgent`."""
    query = urlencode([("uri", uri) for uri in uris])
    found = [Held(**one) for one in _get(agent, f"/v1/models?{query}", limit_s)["models"]]
    return {one.uri: one for one in found}


def prefetch_by(agent: Agent, uri: str, told: Callable[[Progress], None]) -> PrefetchReport:
    """Have an agent bring a model into its store; what `told` raises ends it.

    Raises `NoAgent`, or what went wrong there.
    """
    try:
        connection = _connection(agent, SILENCE_S)
        return asking.prefetch_over(connection, {"uri": uri}, told, _headers(agent))
    except NoAgent as error:
        raise _named(agent, error) from error


def _get(agent: Agent, path: str, limit_s: float) -> Mapping[str, Any]:
    try:
        return asking.get(_connection(agent, limit_s), path, _headers(agent))
    except NoAgent as error:
        raise _named(agent, error) from error


def _connection(agent: Agent, limit_s: float) -> HTTPConnection:
    if not agent.api:
        raise NoAgent("it serves no API over TCP: start it with --api")
    host, _, port = agent.api.rpartition(":")
    return HTTPConnection(host.strip("[]"), int(port), timeout=limit_s)


def _headers(agent: Agent) -> dict[str, str]:
    return {"Authorization": f"Bearer {agent.token}"}


def _named(agent: Agent, error: NoAgent) -> NoAgent:
    return NoAgent(f"the agent at {agent.api or agent.socket} does not help: {error}")
