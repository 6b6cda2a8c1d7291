"""A burst from zero on a real cluster: our autoscaling against Ray's default, in turn.

    python -m weightstream.bench.serve.burst [--repeats 3] [--plot burst.png]

So many clients come at once to a deployment without replicas, and each asks again as soon as it is
answered, until time is over. The application is the same both times: a replica takes `AT_ONCE`
requests at once, an answer takes a second of sleep, and a start is that of a real process plus the
seconds in which weights would come, asleep too, for the machine has few cores. Only the
`autoscaling_config` differs: Ray's has the same target and bounds, and else its defaults.
"""

import argparse
import asyncio
import logging
import os
import random
import socket
import threading
import time
import warnings
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client

from weightstream.bench.errors import BenchError
from weightstream.serve_integration.scaling.options import autoscaling, bounded_queue
from weightstream.serve_integration.scaling.simulate.table import outcome
from weightstream.serve_integration.scaling.simulate.world import Point, Run

AT_ONCE = 10
MOST = 8
_OURS, _RAYS = "weightstream", "Ray default"
_APP = "burst"
_ANSWER_S = 1.0
_POLL_S = 0.1
_TIMEOUT_S = 120.0
_IDLE_S = (10.0, 20.0)
"""Between deployment and burst: over a whole period of Ray's reports, wherever in it it falls."""
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured."""

    repeats: int
    clients: int
    over_s: float
    load_s: float

    @property
    def ideal(self) -> int:
        """Return the replicas that so many clients need."""
        return -(-self.clients // AT_ONCE)


@dataclass(slots=True)
class Asked:
    """What became of the requests of a burst; seconds since it began."""

    accepted: list[tuple[float, float]] = field(default_factory=list)
    """(asked at, answered at)."""
    refused: int = 0


class Model:
    """A replica that takes its time to start and sleeps for its answers."""

    def __init__(self, load_s: float) -> None:
        time.sleep(load_s)

    async def __call__(self) -> str:
        """Answer."""
        await asyncio.sleep(_ANSWER_S)
        return "ok"


def main() -> None:
    """Print a line for each burst, and the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60, help="that a burst goes on")
    parser.add_argument("--load", type=float, default=3, help="seconds asleep in a start")
    parser.add_argument("--plot", type=Path, help="draw the first burst of each")
    given = parser.parse_args()
    plan = Plan(given.repeats, given.clients, given.seconds, given.load)
    runs: list[Run] = []
    with _cluster() as url:
        for _ in range(plan.repeats):
            for name in (_OURS, _RAYS):
                runs.append(_measured(name, plan, url))
                print(_line(runs[-1], plan), flush=True)
    for name in (_OURS, _RAYS):
        print(_summary(name, [run for run in runs if run.name == name], plan))
    if given.plot is not None:
        _draw(runs[:2], plan, given.plot)


def config(name: str) -> AutoscalingConfig:
    """Return what differs: our policy, or Ray's with its own defaults."""
    if name == _OURS:
        return autoscaling(target=AT_ONCE, max=MOST)
    return AutoscalingConfig(min_replicas=0, max_replicas=MOST, target_ongoing_requests=AT_ONCE)


@contextmanager
def _cluster() -> Iterator[str]:
    """Start a head without CPUs and one worker; return the address of the proxy."""
    os.environ.update(_ENVIRONMENT)
    warnings.simplefilter("ignore")
    cluster = Cluster(initialize_head=False, shutdown_at_exit=True)
    try:
        for cpus in (0, MOST):
            cluster.add_node(
                num_cpus=cpus,
                env_vars=_ENVIRONMENT,
                object_store_memory=100 << 20,
                include_dashboard=False,
            )
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        port = _free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}/"
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _measured(name: str, plan: Plan, url: str) -> Run:
    """Deploy, let it be idle, send the burst, take it away again."""
    deployment: Any = serve.deployment(
        name="Model",
        ray_actor_options={"num_cpus": 1},
        autoscaling_config=config(name),
        graceful_shutdown_wait_loop_s=0.1,
        **bounded_queue(2 * plan.clients, at_once=AT_ONCE),
    )(Model)
    serve.run(deployment.bind(plan.load_s), name=_APP, route_prefix="/")
    try:
        if _now().ordered != 0:
            raise BenchError(f"{name} does not begin at zero")
        time.sleep(random.uniform(*_IDLE_S))
        began_s = time.monotonic()
        with _Watch(began_s) as watch:
            asked = asyncio.run(_burst(url, plan, began_s))
    finally:
        serve.delete(_APP)
    return _run(name, plan, asked, watch.points)


class _Watch:
    """Notes how many replicas are wanted and run, until the block ends."""

    def __init__(self, began_s: float) -> None:
        self.points: list[Point] = []
        self._began_s = began_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._note, name="weightstream-burst")

    def _note(self) -> None:
        while not self._ended.wait(_POLL_S):
            self.points.append(_now(time.monotonic() - self._began_s))

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(_TIMEOUT_S)


def _now(at_s: float = 0.0) -> Point:
    """Return the replicas that are ordered and ready; requests are counted by the clients."""
    controller = _get_global_client()._controller
    details = ray.get(controller.get_serve_instance_details.remote(), timeout=_TIMEOUT_S)
    found = details["applications"][_APP]["deployments"]["Model"]
    ready = sum("RUNNING" in str(one["state"]) for one in found["replicas"])
    return Point(at_s, int(found["target_num_replicas"]), ready, 0, 0)


async def _burst(url: str, plan: Plan, began_s: float) -> Asked:
    asked = Asked()
    limit = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=limit, connector=connector) as session:

        async def client() -> None:
            while (at_s := time.monotonic() - began_s) < plan.over_s:
                async with session.get(url) as answer:
                    await answer.read()
                if answer.status == 200:
                    asked.accepted.append((at_s, time.monotonic() - began_s))
                elif answer.status == 429:
                    asked.refused += 1
                    await asyncio.sleep(float(answer.headers["Retry-After"]))
                else:
                    raise BenchError(f"{url} answered {answer.status}")

        async with asyncio.TaskGroup() as group:
            for _ in range(plan.clients):
                group.create_task(client())
    return asked


def _run(name: str, plan: Plan, asked: Asked, watched: Sequence[Point]) -> Run:
    """Return a burst in the simulator's words: the same tables and pictures."""
    points = tuple(_with_requests(point, asked) for point in watched if point.at_s < plan.over_s)
    targets = [ordered for ordered, _ in groupby(points, attrgetter("ordered"))]
    return Run(
        name=name,
        latencies_s=array("d", sorted(end_s - at_s for at_s, end_s in asked.accepted)),
        rejected=asked.refused,
        unanswered=0,
        replica_seconds=sum(point.ordered for point in points) * plan.over_s / len(points),
        largest=max(targets),
        changes=len(targets) - (targets[0] == 0),
        points=points,
    )


def _with_requests(point: Point, asked: Asked) -> Point:
    begun = bisect_right(sorted(at_s for at_s, _ in asked.accepted), point.at_s)
    inside = begun - bisect_right(sorted(end_s for _, end_s in asked.accepted), point.at_s)
    running = min(inside, point.ready * AT_ONCE)
    return Point(point.at_s, point.ordered, point.ready, inside - running, running)


def _line(run: Run, plan: Plan) -> str:
    """Return when which size was ordered, when the ideal one was ready, and the latencies."""
    decided = ", ".join(f"{at_s:.1f} s: {ordered}" for at_s, ordered in _orders(run))
    ideal_s = _ideal_s(run, plan)
    ready = "never" if ideal_s is None else f"at {ideal_s:.1f} s"
    row = outcome(run)
    return (
        f"{run.name:12}  ordered {decided}; {plan.ideal} ready {ready}; p50 {row.p50_s:.2f} s, "
        f"p99 {row.p99_s:.2f} s of {row.accepted} accepted, {row.rejected} refused"
    )


def _orders(run: Run) -> list[tuple[float, int]]:
    orders: list[tuple[float, int]] = []
    for point in run.points:
        if point.ordered != (orders[-1][1] if orders else 0):
            orders.append((point.at_s, point.ordered))
    return orders


def _ideal_s(run: Run, plan: Plan) -> float | None:
    return next((point.at_s for point in run.points if point.ready >= plan.ideal), None)


def _summary(name: str, runs: Sequence[Run], plan: Plan) -> str:
    rows = [outcome(run) for run in runs]
    decided = [[size for _, size in _orders(run)] for run in runs]
    at_once = sum(sizes[0] == plan.ideal for sizes in decided)
    beyond = sum(max(sizes) > plan.ideal for sizes in decided)
    ready = sorted(at_s for run in runs if (at_s := _ideal_s(run, plan)) is not None)
    p50_s, p99_s, accepted = (
        median(map(attrgetter(which), rows)) for which in ("p50_s", "p99_s", "accepted")
    )
    return (
        f"{name:12}  the ideal size in one decision: {at_once} of {len(runs)}, beyond it later: "
        f"{beyond}; ready after {', '.join(f'{at_s:.1f}' for at_s in ready) or 'no'} s; "
        f"medians: p50 {p50_s:.2f} s, "
        f"p99 {p99_s:.2f} s ({min(row.p99_s for row in rows):.2f} to "
        f"{max(row.p99_s for row in rows):.2f}), {accepted:g} accepted"
    )


def _draw(runs: Sequence[Run], plan: Plan, path: Path) -> None:
    from weightstream.serve_integration.scaling.simulate.picture import draw

    title = (
        f"Measured: {plan.clients} clients at once, from zero; {AT_ONCE} requests per replica, "
        f"answers of {_ANSWER_S:g} s, a process's start and {plan.load_s:g} s"
    )
    draw(runs, [(0.0, plan.ideal), (plan.over_s, plan.ideal)], title, path)


if __name__ == "__main__":
    main()
