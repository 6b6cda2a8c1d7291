"""Process standby: worker processes that wait with torch and Serve imported.

A replica that gets one is running 0.4 s after the decision; one that starts its own process imports
torch first and takes 2.3 s (2 cores). Ray starts as many as it is asked for, on top of those that
it has, and does not say which are for whom. So what was asked for is remembered until it has
reported, and only what is still missing is asked for: `look` and `missing` decide, `Keeper` acts.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from weightstream.errors import ClusterError
from weightstream.log import get_logger
from weightstream.serve_integration.standby.check import deployments
from weightstream.serve_integration.standby.raylets import Node, Raylets, Worker

KEEP_ALIVE_S = 600
_FILL_INTERVAL_S = 0.2
_CHECK_INTERVAL_S = 10.0
_REPORT_TIMEOUT_S = 60.0
"""Ray gives a process up that has not reported within 60 s (`worker_register_timeout_seconds`)."""

_AT_ONCE = 2
"""Ray starts no more at once than the machine has cores, and may forget those beyond; one core in
two shall also be left to what serves."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pool:
    """What one look at a node leaves for the next."""

    known: frozenset[str] = frozenset()
    """The ids of all workers that had reported."""
    asked_at_s: tuple[float, ...] = ()
    """When each process was asked for that has not reported yet, the oldest first."""


@dataclass(frozen=True, slots=True)
class Standby:
    """A node's processes after one round."""

    node_id: str
    idle: int
    starting: int
    """Those that were asked for and have not reported, the new ones among them."""
    problem: str = ""
    """Why the node did not answer; the next round asks again."""


def look(pool: Pool, workers: Sequence[Worker], now_s: float) -> Pool:
    """Return the pool after a look at a node's workers.

    Each untouched worker that is new is one of those that were asked for: were it one that Ray
    started for itself, the one asked for would be found later, and the node would have one more
    for a while. A worker that is new and in use answers for none, or a busy node would pile them
    up: one that is used before it was ever seen is missed until its time is over.
    """
    new = sum(worker.untouched and worker.id not in pool.known for worker in workers)
    waiting = tuple(at_s for at_s in pool.asked_at_s[new:] if now_s - at_s < _REPORT_TIMEOUT_S)
    return Pool(frozenset(worker.id for worker in workers), waiting)


def asked(pool: Pool, count: int, now_s: float) -> Pool:
    """Return the pool after `count` more were asked for, also where no answer came.

    A raylet that did not answer in time may have started them all the same.
    """
    return Pool(pool.known, pool.asked_at_s + (now_s,) * count)


def missing(wanted: int, idle: int, starting: int, cpus: float) -> int:
    """Return how many processes to start now, on the way to `wanted` that wait."""
    at_once = max(1, min(_AT_ONCE, int(cpus)))
    return max(0, min(wanted - idle, at_once) - starting)


def fill(wanted: int, timeout_s: float = 60.0, keep_alive_s: int = KEEP_ALIVE_S) -> list[Standby]:
    """Fill up every node once; return when all have reported, or what there is in time.

    A process that has reported may still import: torch takes it two seconds more.
    """
    deadline = time.monotonic() + timeout_s
    with Keeper(wanted, keep_alive_s) as keeper:
        found = keeper.refill()
        while any(one.idle < wanted for one in found) and time.monotonic() < deadline:
            time.sleep(_FILL_INTERVAL_S)
            found = keeper.refill()
    return found


class Keeper:
    """Keeps `wanted` processes waiting on every node that takes replicas; one per cluster.

    Two would both fill up what is used, and may leave twice as many as wanted, never more.
    """

    def __init__(
        self, wanted: int, keep_alive_s: int = KEEP_ALIVE_S, raylets: Raylets | None = None
    ) -> None:
        self._wanted, self._keep_alive_s = wanted, keep_alive_s
        self._raylets = Raylets() if raylets is None else raylets
        self._pools: dict[str, Pool] = {}
        self._off = False

    def refill(self) -> list[Standby]:
        """Look at every node and start what is missing; raises ClusterError when Ray refuses."""
        nodes = self._raylets.nodes()
        now_s = time.monotonic()
        found = self._raylets.workers(nodes)
        pools = {node.id: self._pools.get(node.id, Pool()) for node in nodes}
        looked = {id_: workers for id_, workers in found.items() if not isinstance(workers, str)}
        pools |= {id_: look(pools[id_], workers, now_s) for id_, workers in looked.items()}
        idle = {id_: sum(one.untouched for one in workers) for id_, workers in looked.items()}
        counts = {node: self._missing(pools[node.id], idle, node) for node in nodes}
        counts = {node: count for node, count in counts.items() if count}
        problems = {id_: why for id_, why in found.items() if isinstance(why, str)}
        problems |= self._raylets.start(counts, self._keep_alive_s)
        pools |= {node.id: asked(pools[node.id], count, now_s) for node, count in counts.items()}
        self._pools = pools
        return [self._standby(node.id, idle, problems) for node in nodes]

    def run(self, ended: threading.Event, interval_s: float = 1.0) -> None:
        """Refill until the event is set, or until Ray refuses: then say so once and stop.

        Nothing is started while every deployment of Serve has a runtime environment of its own.
        """
        check_at_s = 0.0
        while not ended.is_set():
            try:
                if time.monotonic() >= check_at_s:
                    self._turn_off_or_on(deployments().all_fresh)
                    check_at_s = time.monotonic() + _CHECK_INTERVAL_S
                self.refill()
            except ClusterError as error:
                log.warning("%s", error)
                if not error.transient:
                    return
            ended.wait(interval_s)

    def close(self) -> None:
        """Hang up; what waits stays until its time is over."""
        self._raylets.close()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turn_off_or_on(self, off: bool) -> None:
        if off and not self._off:
            log.warning("no deployment can use processes that wait: each has a runtime_env")
        self._off = off

    def _missing(self, pool: Pool, idle: dict[str, int], node: Node) -> int:
        if self._off or node.id not in idle:  # it did not answer
            return 0
        return missing(self._wanted, idle[node.id], len(pool.asked_at_s), node.cpus)

    def _standby(self, node_id: str, idle: dict[str, int], problems: dict[str, str]) -> Standby:
        starting = len(self._pools.get(node_id, Pool()).asked_at_s)
        return Standby(node_id, idle.get(node_id, 0), starting, problems.get(node_id, ""))
