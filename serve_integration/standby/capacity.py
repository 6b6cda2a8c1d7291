"""Standby capacity: room for some steps of replicas that nobody uses yet, on a schedule.

Ray's autoscaler keeps nodes that `request_resources` asks for. What is asked for is the total that
the cluster must be able to hold, so the used is in it: each busy node as a whole, because a smaller
bundle could be thought elsewhere and leave room that is really in pieces; then the replicas that do
not fit beside what busy nodes do. A cluster has one such request: the last one replaces all others.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from weightstream.errors import ClusterError, UsageError
from weightstream.log import get_logger
from weightstream.serve_integration import registry
from weightstream.serve_integration.standby.schedule import Window, steps_at

if TYPE_CHECKING:
    from weightstream.serve_integration.nodes import Warming

log = get_logger(__name__)

_NOTE = "standby/bundles"
_RETRY_S = 300.0
_ROUNDING = 1e-6

Bundle = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step holds room for: so many replicas of that size."""

    replica: Bundle
    size: int = 1


@dataclass(frozen=True, slots=True)
class Room:
    """A node that takes replicas: what it has, and what of it is free."""

    node_id: str
    total: Bundle
    free: Bundle


@dataclass(frozen=True, slots=True)
class Holding:
    """What is held after a round."""

    wanted: int
    """Replicas that shall have room beyond those that run."""
    asked: int
    """Replicas that room was asked for: fewer where the autoscaler can have no more nodes."""
    room: int
    """Replicas that have it now."""
    nodes: tuple[str, ...] = ()
    """The nodes with room for one."""


def bundles(rooms: Sequence[Room], replica: Bundle, count: int) -> list[dict[str, float]]:
    """Return the total to ask for so that `count` more replicas have room.

    Only the kinds of resources that a replica needs count. Were busy nodes asked for by what is
    used of them, two halves could be thought on one node and the other be counted as free.
    """
    if count <= 0:
        return []
    busy = [room for room in rooms if _used(room, replica)]
    held = [{kind: room.total.get(kind, 0) for kind in replica} for room in busy]
    held = [{kind: amount for kind, amount in one.items() if amount > 0} for one in held]
    missing = count - sum(fits(room.free, replica) for room in busy)
    return held + [dict(replica)] * max(0, missing)


def fits(free: Bundle, replica: Bundle) -> int:
    """Return how many replicas have room in what is free."""
    needs = [(kind, amount) for kind, amount in replica.items() if amount > 0]
    return min(math.floor(free.get(kind, 0) / amount + _ROUNDING) for kind, amount in needs)


def retreat(asked: int, room: int) -> int:
    """Return how many to ask for after the autoscaler refused `asked`, with room for `room` now.

    It grants a request as a whole or not at all, and does not say how much it could: half way back
    to what there is, until it agrees.
    """
    return min(asked - 1, asked - math.ceil((asked - room) / 2))


def parse_bundle(text: str) -> Bundle:
    """Return the resources of `CPU=1,GPU=0.5`; raises UsageError for anything else."""
    found: dict[str, float] = {}
    for pair in text.split(","):
        kind, _, amount = pair.partition("=")
        try:
            found[kind.strip()] = float(amount)
        except ValueError:
            raise UsageError(f"{pair!r} is no resource: CPU=1,GPU=0.5") from None
    if not all(kind and 0 < amount < math.inf for kind, amount in found.items()):
        raise UsageError(f"{text!r} has a resource without name or amount: CPU=1,GPU=0.5")
    return found


class Holder:
    """Holds room by a schedule, and has the nodes with room prefetch; one per cluster."""

    def __init__(
        self,
        step: Step,
        schedule: tuple[Window, ...],
        uris: Sequence[str] = (),
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._step, self._schedule, self._uris, self._now = step, schedule, tuple(uris), now
        self._gcs = GcsClient(address=ray.get_runtime_context().gcs_address)
        self._asked: list[dict[str, float]] | None = None
        self._asked_count = 0
        self._most: int | None = None
        self._retry_at_s = 0.0
        self._warmed: tuple[str, ...] = ()
        self._warming: Warming | None = None

    def refresh(self) -> Holding:
        """Ask for what the schedule wants now, and have the nodes that joined prefetch.

        Raises ClusterError when the cluster does not answer, or when somebody else holds nodes by
        `request_resources`: this would let go of them.
        """
        if self._asked is None and (others := _asked_by_others(self._gcs)):
            raise ClusterError(
                f"somebody holds {others} bundles by request_resources, which this would replace; "
                "`weightstream serve standby --release` lets go of them"
            )
        rooms, replica = rooms_now(self._gcs), self._step.replica
        room = sum(fits(one.free, replica) for one in rooms)
        wanted = steps_at(self._schedule, self._now()) * self._step.size
        asked = self._affordable(wanted, room)
        self._ask(bundles(rooms, replica, asked), asked)
        roomy = tuple(one.node_id for one in rooms if fits(one.free, replica))
        if asked:
            self._warm(roomy)
        return Holding(wanted, asked, room, roomy)

    def run(
        self,
        ended: threading.Event,
        told: Callable[[Holding], None] = lambda _: None,
        interval_s: float = 5.0,
    ) -> None:
        """Refresh until the event is set, then let go; tell of every change."""
        last: Holding | None = None
        while not ended.is_set():
            try:
                if (found := self.refresh()) != last:
                    told(found)
                last = found
            except ClusterError as error:
                if not error.transient:
                    raise
                log.warning("%s; asking again", error)
            ended.wait(interval_s)
        self.release()

    def release(self) -> None:
        """Let go of what is held; the autoscaler takes back what nobody uses."""
        if self._warming is not None:
            self._warming.cancel()
        release()
        self._asked = []

    def _affordable(self, wanted: int, room: int) -> int:
        if time.monotonic() >= self._retry_at_s:
            self._most = None
        if self._asked and _size(self._asked) in _refused(self._gcs):
            if self._most is None:
                log.warning("the autoscaler cannot hold room for %d replicas", self._asked_count)
                self._retry_at_s = time.monotonic() + _RETRY_S
            self._most = retreat(self._asked_count, room)
        return wanted if self._most is None else min(wanted, self._most)

    def _ask(self, total: list[dict[str, float]], count: int) -> None:
        _request(total)  # each time: the autoscaler may be younger than the last one
        if total != self._asked:
            log.info("room for %d replicas asked for: %d bundles in all", count, len(total))
        self._asked, self._asked_count = total, count

    def _warm(self, node_ids: tuple[str, ...]) -> None:
        joined = tuple(one for one in node_ids if one not in self._warmed)
        if not self._uris or not joined or (self._warming is not None and not self._warming.done):
            return
        from weightstream.serve_integration.nodes import warm

        self._warming = warm(self._uris, joined)
        self._warmed = node_ids


def release() -> None:
    """Let go of whatever was asked for by `request_resources`, by whomever."""
    _request([])


def rooms_now(gcs: Any) -> list[Room]:
    """Return the nodes that take replicas and are not being drained."""
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    try:
        states = get_cluster_resource_state(gcs).node_states
    except ray.exceptions.RayError as error:
        text = f"Ray does not say what its nodes have: {error}"
        raise ClusterError(text, transient=True) from error
    return [
        Room(one.node_id.hex(), dict(one.total_resources), dict(one.available_resources))
        for one in states
        if one.status in (NodeStatus.RUNNING, NodeStatus.IDLE)
    ]


def _used(room: Room, replica: Bundle) -> bool:
    return any(room.total.get(kind, 0) - room.free.get(kind, 0) > _ROUNDING for kind in replica)


def _request(total: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    is_autoscaler_v2(fetch_from_server=True)  # else Ray keeps its first answer, from before it ran
    registry.note(_NOTE, _size(total))
    request_resources(bundles=total)


def _size(total: Sequence[Bundle]) -> list[float]:
    """Return what tells one request from another: how many bundles, and how much in all."""
    return [len(total), round(sum(sum(bundle.values()) for bundle in total), 3)]


def _sizes(constraints: Any) -> list[list[float]]:
    """Return the sizes of requests as the cluster has them."""
    return [
        _size([dict(one.request.resources_bundle) for one in found for _ in range(one.count)])
        for found in (constraint.resource_requests for constraint in constraints)
    ]


def _asked_by_others(gcs: Any) -> int:
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    sizes = _sizes(get_cluster_resource_state(gcs).cluster_resource_constraints)
    ours = registry.recall(_NOTE)
    return sum(int(size[0]) for size in sizes if size != ours)


def _refused(gcs: Any) -> list[list[float]]:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply.FromString(gcs.get_cluster_status())
    return _sizes(reply.autoscaling_state.infeasible_cluster_resource_constraints)
