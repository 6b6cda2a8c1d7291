"""A Ray cluster of several nodes on this machine, with Serve on it and traffic against it.

Each node is a real raylet with its own resources and environment, so `WEIGHTSTREAM_STORE` and
`WEIGHTSTREAM_RUN_DIRECTORY` differ from node to node as they do between machines: replicas inherit
them. Several clusters may run at once, also beside those of other people: nothing here is
machine-wide (`ray stop` is, so never use it).
"""

import asyncio
import contextlib
import logging
import os
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from tests.kit.s3 import free_port

with warnings.catch_warnings():  # Ray's own modules use what pydantic deprecates
    warnings.simplefilter("ignore")
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

START_TIMEOUT_S = 60.0
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def wait_until(holds: Callable[[], object], what: str, within_s: float = START_TIMEOUT_S) -> None:
    """Return as soon as something holds; fail, naming it, when it does not in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {within_s:g} s")
        time.sleep(0.05)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node: what it offers to Ray."""

    cpus: float = 2
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunningNode:
    """One node that runs; `home` holds its store and run directory."""

    id: str
    home: Path
    handle: Any


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica as Serve's controller sees it; `node_id` is empty while it has none."""

    app: str
    deployment: str
    id: str
    state: str
    node_id: str


class RayCluster:
    """A head without CPUs of its own, and workers; the calling process is connected as a driver.

    `env` goes to every process of the cluster, the Serve controller's too.
    """

    def __init__(
        self,
        workers: Sequence[NodeSpec] = (NodeSpec(), NodeSpec()),
        env: Mapping[str, str] | None = None,
        head: NodeSpec = NodeSpec(cpus=0),
    ) -> None:
        self._specs = (head, *workers)
        self._env = dict(env or {})
        self._stack = contextlib.ExitStack()
        self.nodes: list[RunningNode] = []
        self.http_port = free_port()

    @property
    def head(self) -> RunningNode:
        """Return the head node."""
        return self.nodes[0]

    @property
    def workers(self) -> list[RunningNode]:
        """Return the nodes that have CPUs, as far as they are still there."""
        return self.nodes[1:]

    @property
    def address(self) -> str:
        """Return the address for `ray.init` and the command line."""
        return str(self._cluster.address)

    def url(self, path: str = "/") -> str:
        """Return the address of an application's route."""
        return f"http://127.0.0.1:{self.http_port}{path}"

    def add_node(self, spec: NodeSpec) -> RunningNode:
        """Start one more node."""
        home = self.directory / f"node-{len(self.nodes)}-{time.monotonic_ns()}"
        home.mkdir()
        own = {
            "WEIGHTSTREAM_STORE": str(home / "store"),
            "WEIGHTSTREAM_RUN_DIRECTORY": str(home / "run"),
        }
        known = {node["NodeID"] for node in ray.nodes()} if self.nodes else set()
        handle = self._cluster.add_node(
            num_cpus=spec.cpus,
            resources=dict(spec.resources),
            labels=dict(spec.labels),
            object_store_memory=100 << 20,
            env_vars=_ENVIRONMENT | self._env | own,
            include_dashboard=False,
        )
        if not self.nodes:
            ray.init(
                address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR
            )
        (node_id,) = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - known
        node = RunningNode(node_id, home, handle)
        self.nodes.append(node)
        return node

    def kill_node(self, node: RunningNode) -> None:
        """Kill a node's processes without a word."""
        self._cluster.remove_node(node.handle, allow_graceful=False)
        self.nodes.remove(node)

    def start_serve(self, **http_options: object) -> None:
        """Start Serve with its proxy on the head node only."""
        options = {"host": "127.0.0.1", "port": self.http_port}
        serve.start(proxy_location="HeadOnly", http_options=options | http_options)

    def replicas(self, app: str | None = None) -> list[Replica]:
        """Return the replicas that the controller knows."""
        from ray.serve.context import _get_global_client

        details: dict[str, Any] = _get_global_client().get_serve_details()
        return [
            Replica(
                name,
                deployment,
                one["replica_id"],
                str(one["state"]).rpartition(".")[2],
                one.get("node_id") or "",
            )
            for name, application in details["applications"].items()
            for deployment, found in application["deployments"].items()
            for one in found["replicas"]
            if app in (None, name)
        ]

    def running(self, app: str | None = None) -> list[Replica]:
        """Return the replicas that run."""
        return [replica for replica in self.replicas(app) if replica.state == "RUNNING"]

    def __enter__(self) -> "RayCluster":
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-")))
            stack.enter_context(_environment(_ENVIRONMENT | self._env))
            self._cluster = Cluster(initialize_head=False, shutdown_at_exit=True)
            stack.callback(self._cluster.shutdown)
            stack.callback(ray.shutdown)
            stack.callback(_serve_shutdown)
            for spec in self._specs:
                self.add_node(spec)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def _serve_shutdown() -> None:
    if ray.is_initialized():
        serve.shutdown()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's end: HTTP status, or 0 and the exception's name and text in `body`."""

    began_s: float
    took_s: float
    status: int
    body: str


class Traffic:
    """Open-loop requests at a steady rate from a thread of its own, until the block ends.

    with Traffic(cluster.url("/app"), per_s=20) as traffic:
        ...
    assert traffic.failures() == []
    """

    def __init__(self, url: str, per_s: float, timeout_s: float = 60.0) -> None:
        self.answers: list[Answer] = []
        self._url, self._per_s, self._timeout_s = url, per_s, timeout_s
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main()), name="pytest-traffic"
        )

    def failures(self) -> list[Answer]:
        """Return the answers that are no 200."""
        return [answer for answer in self.answers if answer.status != 200]

    def statuses(self) -> Counter[int]:
        """Return how many answers had which status."""
        return Counter(answer.status for answer in self.answers)

    def stop(self) -> None:
        """Ask nothing more and wait for every answer."""
        self._ended.set()
        self._thread.join(self._timeout_s + 10)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _main(self) -> None:
        limit = aiohttp.ClientTimeout(total=self._timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=limit, connector=connector) as session:
            asked = []
            while not self._ended.is_set():
                asked.append(asyncio.create_task(self._ask(session)))
                await asyncio.sleep(1 / self._per_s)
            await asyncio.gather(*asked)

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        began_s = time.monotonic()
        try:
            async with session.get(self._url) as response:
                status, body = response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            status, body = 0, f"{type(error).__name__}: {error}"
        self.answers.append(Answer(began_s, time.monotonic() - began_s, status, body))
