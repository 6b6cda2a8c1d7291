"""Having nodes bring models into their stores before somebody there waits for them.

Everything that waits does so on threads of its own, so that the Serve controller, too, can ask.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from weightstream.cachefs.agent.asking import NoAgent
from weightstream.cachefs.fetch import Progress
from weightstream.errors import LoadCancelled, UsageError, WeightstreamError
from weightstream.log import get_logger
from weightstream.serve_integration import registry
from weightstream.serve_integration.nodes import cluster
from weightstream.serve_integration.nodes.talking import prefetch_by
from weightstream.serve_integration.registry import Agent, Deployment

log = get_logger(__name__)

_NO_API = "its agent serves no API over TCP: start it with --api"
_AT_ONCE = 64  # nodes; each costs a thread that mostly sleeps

State = Literal["waiting", "warming", "warm", "skipped", "failed", "cancelled"]
Plan = Callable[[], tuple[Sequence[str], Sequence[str]]]
"""Finds out which models, and which nodes; may wait for the cluster."""


@dataclass(frozen=True, slots=True)
class NodeProgress:
    """How far one node is."""

    node_id: str
    state: State = "waiting"
    bytes_done: int = 0
    bytes_total: int = 0
    """Of the models that were begun."""
    by_source: dict[str, int] = field(default_factory=dict)
    reason: str = ""
    """Why it was skipped, or failed."""


class Warming:
    """Nodes that are being warmed, from its making on. Thread-safe.

    The agents go on only while somebody listens: `cancel` it, or let the process end, and they stop
    what nobody else asked for.
    """

    def __init__(self, plan: Plan) -> None:
        self._lock = threading.Lock()
        self._nodes: dict[str, NodeProgress] = {}
        self._error: WeightstreamError | None = None
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._begun_s = time.monotonic()
        self._start(lambda: self._lead(plan))

    def progress(self) -> dict[str, NodeProgress]:
        """Return how far each node is, by its id."""
        with self._lock:
            return dict(self._nodes)

    @property
    def done(self) -> bool:
        """Say whether no node is warmed any more, for better or worse."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all nodes are done, warm or not; return whether that was in time.

        Raises what kept it from beginning: no such deployment, no cluster.
        """
        ended = self._done.wait(timeout_s)
        if self._error is not None:
            raise self._error
        return ended

    def warm(self) -> frozenset[str]:
        """Return the nodes that hold everything now."""
        return frozenset(one.node_id for one in self.progress().values() if one.state == "warm")

    def errors(self) -> dict[str, str]:
        """Return why nodes failed; those that were skipped for want of an agent are not here."""
        return {one.node_id: one.reason for one in self.progress().values() if _failed(one)}

    def cancel(self) -> None:
        """Stop; returns at once."""
        self._cancelled.set()

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, daemon=True, name="weightstream-warming")
        thread.start()
        return thread

    def _lead(self, plan: Plan) -> None:
        try:
            uris, node_ids = plan()
            with self._lock:
                self._nodes = {one: NodeProgress(one) for one in node_ids}
            self._warm_all(uris, node_ids)
        except WeightstreamError as error:
            self._error = error
        except Exception as error:  # whoever waits must hear of it
            self._error = WeightstreamError(f"internal error: {error!r}")
            log.exception("unexpected, warming")
        finally:
            self._done.set()

    def _warm_all(self, uris: Sequence[str], node_ids: Sequence[str]) -> None:
        refused = {one.node_id: one.error for one in cluster.ensure(node_ids) if one.error}
        agents = registry.agents()
        todo: queue.SimpleQueue[Agent] = queue.SimpleQueue()
        for node_id in node_ids:
            if node_id in agents:
                todo.put(agents[node_id])
            else:
                why = refused.get(node_id, "it has no agent: `weightstream serve up`")
                self._set(node_id, state="skipped", reason=why)
        count = min(_AT_ONCE, todo.qsize())
        for thread in [self._start(lambda: self._work(todo, uris)) for _ in range(count)]:
            thread.join()

    def _work(self, todo: "queue.SimpleQueue[Agent]", uris: Sequence[str]) -> None:
        while True:
            try:
                agent = todo.get_nowait()
            except queue.Empty:
                return
            self._warm_one(agent, uris)

    def _warm_one(self, agent: Agent, uris: Sequence[str]) -> None:
        node_id = agent.node_id
        if not agent.api:
            return self._set(node_id, state="skipped", reason=_NO_API)
        self._set(node_id, state="warming")
        try:
            for uri in uris:
                self._bring(agent, uri)
        except LoadCancelled:
            self._set(node_id, state="cancelled")
        except (NoAgent, WeightstreamError) as error:
            self._set(node_id, state="failed", reason=str(error))
            log.info("node %s is not warm: %s", node_id, error)
        else:
            self._set(node_id, state="warm")

    def _bring(self, agent: Agent, uri: str) -> None:
        before = self.progress()[agent.node_id]

        def told(now: Progress) -> None:
            if self._cancelled.is_set():
                raise LoadCancelled(f"{uri}: nobody wants it warm any more")
            self._set(agent.node_id, **_on_top(before, now))

        if self._cancelled.is_set():
            raise LoadCancelled(f"{uri}: nobody wants it warm any more")
        report = prefetch_by(agent, uri, told)
        total = before.bytes_total + report.bytes_total
        self._set(agent.node_id, bytes_done=total, bytes_total=total)
        log.info(
            "node %s holds %s: %d of %d bytes fetched in %.1f s",
            agent.node_id, uri, report.bytes_fetched, report.bytes_total, report.elapsed_s,
        )  # fmt: skip

    def _set(self, node_id: str, **changes: object) -> None:
        with self._lock:
            self._nodes[node_id] = replace(self._nodes[node_id], **changes)  # type: ignore[arg-type]


def warm(what: str | Deployment | Iterable[str], node_ids: Iterable[str] | None = None) -> Warming:
    """Have nodes prefetch: a model, several, or what the replicas of a deployment load.

    Without `node_ids`, every node that has an agent. Returns at once. A node of the list without an
    agent gets one, if `up` was called before; else it is skipped, with the reason in its progress.
    Nodes that begin together read what they need from the origin once, and from each other.
    """
    wanted = None if node_ids is None else tuple(dict.fromkeys(node_ids))
    models = what if isinstance(what, str | Deployment) else tuple(what)
    return Warming(
        lambda: (uris_of(models), tuple(registry.agents()) if wanted is None else wanted)
    )


def uris_of(what: str | Deployment | Sequence[str]) -> tuple[str, ...]:
    """Return the models that are meant; raises `UsageError` when a deployment has named none."""
    if isinstance(what, str):
        return (what,)
    if not isinstance(what, Deployment):
        return tuple(what)
    uris = tuple(one.uri for one in registry.weights_of(what))
    if not uris:
        raise UsageError(
            f"{what.app}/{what.name}: no replica of it has said yet what it loads; name the URI"
        )
    return uris


def _failed(one: NodeProgress) -> bool:
    return one.state == "failed"


def _on_top(before: NodeProgress, now: Progress) -> dict[str, object]:
    sources = dict(before.by_source)
    for name, count in now.bytes_by_source.items():
        sources[name] = sources.get(name, 0) + count
    return {
        "bytes_done": before.bytes_done + now.bytes_done,
        "bytes_total": before.bytes_total + now.bytes_total,
        "by_source": sources,
    }
