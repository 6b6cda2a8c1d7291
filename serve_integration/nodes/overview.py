"""What a cluster looks like: its nodes, the replicas there, their agents, and what those hold."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from weightstream.cachefs.agent.held import Held
from weightstream.serve_integration import registry
from weightstream.serve_integration.nodes import holding
from weightstream.serve_integration.nodes.cluster import tracker
from weightstream.serve_integration.nodes.fleet import NodeState, node_states, served
from weightstream.serve_integration.nodes.talking import NoAgent, status_of
from weightstream.serve_integration.nodes.tasks import alive_nodes
from weightstream.serve_integration.registry import Agent

_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class AgentState:
    """How a node's agent is: `ready`, `waiting`, `draining`, `silent`, `unreachable` or `none`.

    `unreachable` has no API over TCP; `detail` says what it waits for, or why it does not answer.
    """

    state: str
    detail: str = ""
    is_ours: bool = False
    """`up` started it."""
    peers: int = 0
    """Members that it hears, itself among them."""
    store_bytes: int = 0
    room_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NodeOverview:
    """One node."""

    node_id: str
    host: str
    is_head: bool
    status: str
    """Ray's word: `RUNNING`, `IDLE`, `DRAINING`."""
    replicas: Mapping[str, int]
    """By `app/deployment`."""
    agent: AgentState
    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class ClusterOverview:
    """The cluster."""

    tracker: str
    models: Mapping[str, int]
    """What deployments load: by URI, the size that their replicas noted."""
    nodes: tuple[NodeOverview, ...]


def cluster_status() -> ClusterOverview:
    """Ask Ray, Serve and every agent; takes some seconds where an agent does not answer."""
    deployments = served()
    models = {
        one.uri: one.size_bytes
        for found in deployments
        for one in registry.weights_of(found.deployment)
    }
    replicas: dict[str, Counter[str]] = {}
    for found in deployments:
        name = f"{found.deployment.app}/{found.deployment.name}"
        for node_id in found.replica_nodes:
            replicas.setdefault(node_id, Counter())[name] += 1
    agents = registry.agents()
    states, held = _agent_states(list(agents.values())), holding.holdings(tuple(models))
    none, alive = AgentState("none"), alive_nodes()
    rays = node_states()
    nodes = (
        NodeOverview(
            node_id=node.id,
            host=node.host,
            is_head=node.is_head,
            status=_status(rays.get(node.id)),
            replicas=dict(replicas.get(node.id, {})),
            agent=states.get(node.id, none),
            held=tuple(held.get(node.id, {}).values()),
        )
        for node in alive.values()
    )
    return ClusterOverview(tracker(), models, tuple(nodes))


def _status(state: NodeState | None) -> str:
    return state.status if state is not None else "UNKNOWN"


def _agent_states(agents: Sequence[Agent]) -> dict[str, AgentState]:
    if not agents:
        return {}
    name = "weightstream-status"
    with ThreadPoolExecutor(min(_AT_ONCE, len(agents)), thread_name_prefix=name) as pool:
        found = pool.map(_agent_state, agents)
        return {agent.node_id: state for agent, state in zip(agents, found, strict=True)}


def _agent_state(agent: Agent) -> AgentState:
    is_ours = agent.pid > 0
    if not agent.api:
        return AgentState("unreachable", "no API over TCP: start it with --api", is_ours)
    try:
        said = status_of(agent)
    except NoAgent as error:
        return AgentState("silent", str(error), is_ours)
    lacking = ", ".join(said["waits_for"])
    state = "draining" if said["draining"] else "waiting" if lacking else "ready"
    return AgentState(
        state,
        f"for {lacking}" if lacking else "",
        is_ours,
        len(said["peers"]["members"]) if said["peers"] else 0,
        said["store"]["usage_bytes"],
        said["store"]["room_bytes"],
    )
