"""What each node holds of a model, as its agent says it; remembered for a moment.

Schedulers ask for each replica that they place, several times a second.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from weightstream.cachefs.agent.asking import NoAgent
from weightstream.cachefs.agent.held import Held
from weightstream.log import get_logger
from weightstream.serve_integration import registry
from weightstream.serve_integration.nodes.talking import held_by
from weightstream.serve_integration.registry import Agent

log = get_logger(__name__)

REMEMBER_S = 1.5
_AT_ONCE = 32
_MOST_ANSWERS = 256

Holdings = dict[str, dict[str, Held]]
"""By node, then by URI."""


def held(uri: str) -> dict[str, int]:
    """Return how many bytes of a model each node holds; nodes whose agent is silent are left out.

    Of the version that the node knows. Blocks for three seconds at most where an agent is silent.
    """
    return {node: models[uri].held_bytes for node, models in holdings((uri,)).items()}


def holdings(uris: Sequence[str]) -> Holdings:
    """The same of several models, with their sizes; one question to each node."""
    asked = tuple(sorted(set(uris)))
    return _answers.of(asked).get(asked)


class _Answer:
    """The last answer to one question: whoever asks at the same time waits for it, too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holdings: Holdings = {}
        self._at_s = -REMEMBER_S

    def get(self, uris: Sequence[str]) -> Holdings:
        with self._lock:
            if time.monotonic() - self._at_s >= REMEMBER_S:
                self._holdings = _ask_all(tuple(registry.agents().values()), uris)
                self._at_s = time.monotonic()
            return self._holdings


class _Answers:
    """By what was asked; a scheduler asks for the few models of its deployments."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[tuple[str, ...], _Answer] = OrderedDict()

    def of(self, uris: tuple[str, ...]) -> _Answer:
        with self._lock:
            answer = self._answers.setdefault(uris, _Answer())
            self._answers.move_to_end(uris)
            while len(self._answers) > _MOST_ANSWERS:
                self._answers.popitem(last=False)
            return answer

    def forget(self) -> None:
        with self._lock:
            self._answers.clear()


_answers = _Answers()
forget = _answers.forget
"""Have the next question asked anew."""


def _ask_all(agents: Sequence[Agent], uris: Sequence[str]) -> Holdings:
    reachable = [agent for agent in agents if agent.api]
    if not reachable or not uris:
        return {}
    name = "weightstream-held"
    with ThreadPoolExecutor(min(_AT_ONCE, len(reachable)), thread_name_prefix=name) as pool:
        answers = pool.map(lambda agent: _ask(agent, uris), reachable)
        return {agent.node_id: one for agent, one in zip(reachable, answers, strict=True) if one}


def _ask(agent: Agent, uris: Sequence[str]) -> dict[str, Held]:
    try:
        return held_by(agent, uris)
    except NoAgent as error:
        log.info("not asked what it holds: %s", error)
        return {}
