"""Replicas that start although agents die, the origin is away or the store's disk is no use."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from ray import serve
from tests.kit import faults as f
from tests.kit.disks import small_disk
from tests.kit.models import plain, tensors
from tests.kit.proxy import FaultProxy
from tests.kit.ray_cluster import NodeSpec, RayCluster, wait_until
from tests.kit.s3 import S3Server
from tests.serve_integration.loading.apps import LAYERS, Digest, digest_of
from tests.serve_integration.loading.test_examples import ask
from tests.serve_integration.nodes.conftest import SETTINGS, daemon, kill

from weightstream.serve_integration import nodes
from weightstream.serve_integration.loading.noting import noted_loads
from weightstream.serve_integration.loading.phases import Phases

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

MIB = 1 << 20
SIZE = 16 * MIB


@dataclass(frozen=True, slots=True)
class Model:
    """A model in the origin, of a test's own."""

    name: str
    digest: str

    @property
    def uri(self) -> str:
        return f"s3://models/{self.name}"


@pytest.fixture
def model(s3: S3Server, request: pytest.FixtureRequest) -> Model:
    name = request.node.name.removeprefix("test_").replace("[", "-").rstrip("]")
    files = plain(SIZE, LAYERS, name)
    s3.put_files(f"models/{name}", files)
    return Model(name, digest_of(tensors(files)))


@pytest.fixture(scope="module", autouse=True)
def _agents(cluster: RayCluster) -> Iterator[None]:
    assert {one.way for one in up()} == {"started"}
    yield
    nodes.down()


@pytest.fixture(autouse=True)
def _no_faults(origin: FaultProxy) -> None:
    origin.clear()


def up() -> tuple[nodes.NodeReport, ...]:
    return nodes.up(["s3://models"], SETTINGS)


class Starting:
    """A replica that starts on the node that has a resource; a context manager that ends it."""

    def __init__(self, cluster: RayCluster, model: Model, resource: str) -> None:
        self._cluster, self._model = cluster, model
        where = {"num_cpus": 0, "resources": {resource: 0.01}}
        deployment: Any = Digest
        app = deployment.options(ray_actor_options=where).bind(model.uri, SIZE // LAYERS // 4)
        self._pool = ThreadPoolExecutor(1, "pytest-run")
        self._run = lambda: serve.run(app, name=model.name, route_prefix=f"/{model.name}")
        self._running: Future[object] | None = None

    def start(self) -> Phases:
        """Wait until it answers, right; return what its start took."""
        assert self._running is not None
        self._running.result(90)
        assert ask(self._cluster, f"/{self._model.name}") == self._model.digest
        wait_until(lambda: noted_loads(self._model.name), "its load is noted")
        (found,) = noted_loads(self._model.name)
        (phases,) = found.loads
        return phases

    def __enter__(self) -> "Starting":
        self._running = self._pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        serve.delete(self._model.name)


def test_without_its_agent_a_replica_loads_by_itself(cluster: RayCluster, model: Model) -> None:
    kill(cluster.workers[0])
    with Starting(cluster, model, "node1") as replica:
        phases = replica.start()
    assert phases.warmth == "origin"
    assert phases.bytes_by_source.get("agent", 0) == 0
    up()


def test_an_agent_that_dies_in_mid_load_costs_no_start(
    cluster: RayCluster, origin: FaultProxy, model: Model
) -> None:
    up()
    origin.add(f.When(model.name, "GET", ranged=True, times=None), f.Drip(4 * MIB))
    with Starting(cluster, model, "node1") as replica:
        wait_until(lambda: origin.body_bytes(model.name) > MIB, "its agent reads")
        kill(cluster.workers[0])
        origin.clear()
        phases = replica.start()
    assert sum(phases.bytes_by_source.values()) == phases.bytes_total > SIZE
    assert phases.bytes_by_source.get("origin", 0) > 0
    up()


def test_an_agent_that_hangs_in_mid_load_costs_no_start(
    cluster: RayCluster, origin: FaultProxy, model: Model
) -> None:
    up()
    origin.add(f.When(model.name, "GET", ranged=True, times=None), f.Drip(4 * MIB))
    running = daemon(cluster.workers[0]).running()
    assert running is not None
    with Starting(cluster, model, "node1") as replica:
        wait_until(lambda: origin.body_bytes(model.name) > MIB, "its agent reads")
        os.kill(running.pid, signal.SIGSTOP)
        origin.clear()
        try:
            replica.start()
        finally:
            os.kill(running.pid, signal.SIGCONT)


def test_what_nobody_holds_comes_from_the_origin_through_the_agent(
    cluster: RayCluster, model: Model
) -> None:
    up()
    with Starting(cluster, model, "node2") as replica:
        phases = replica.start()
    assert max(phases.bytes_by_source, key=lambda one: phases.bytes_by_source[one]) == "agent"
    assert phases.warmth == "origin"


def test_what_a_peer_holds_comes_from_the_peer(
    cluster: RayCluster, origin: FaultProxy, model: Model
) -> None:
    up()
    warm(model, cluster.workers[0].id)
    read = origin.body_bytes(model.name)
    with Starting(cluster, model, "node2") as replica:
        assert replica.start().warmth == "peer"
    assert origin.body_bytes(model.name) == read


@pytest.mark.parametrize("trouble", ["full", "full-with-agent", "read-only"])
def test_a_disk_of_no_use_costs_no_start(cluster: RayCluster, model: Model, trouble: str) -> None:
    """An agent has its store open for writing, so that its disk cannot be remounted."""
    node = cluster.add_node(NodeSpec(cpus=0, resources={trouble: 1}))
    try:
        with small_disk(node.home / "disk", 2 * MIB) as disk:
            (disk.path / "store").mkdir()
            (node.home / "store").symlink_to(disk.path / "store")
            if trouble == "full-with-agent":
                assert [one.way for one in nodes.ensure([node.id])] == ["started"]
            if trouble == "read-only":
                disk.set_read_only(True)
            else:
                disk.fill()
            with Starting(cluster, model, trouble) as replica:
                assert replica.start().bytes_total > SIZE
            daemon(node).stop()
    finally:
        daemon(node).stop()
        cluster.kill_node(node)


def test_with_the_origin_away_what_a_peer_holds_is_enough(
    cluster: RayCluster, origin: FaultProxy, model: Model
) -> None:
    """The last of this module: the origin does not come back."""
    up()
    warm(model, cluster.workers[0].id)
    origin.__exit__(None, None, None)
    with Starting(cluster, model, "node2") as replica:
        phases = replica.start()
    assert phases.warmth == "peer"
    assert phases.bytes_by_source.get("origin", 0) == 0


def warm(model: Model, node_id: str) -> None:
    warming = nodes.warm(model.uri, [node_id])
    assert warming.wait(60)
    assert warming.progress()[node_id].state == "warm", warming.progress()
