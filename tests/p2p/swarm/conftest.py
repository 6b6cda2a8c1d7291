"""Nodes whose bulk goes through a swarm: each on a loopback address of its own, as on machines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.conftest import SettingsFactory
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, storage_options
from tests.p2p.exchange.conftest import Cluster, Node, Told

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch.budget import MemoryBudget
from weightstream.cachefs.fetch.slabs import SlabPool
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.origin import open_origin
from weightstream.cachefs.store import Store
from weightstream.p2p.exchange import Exchange, joining
from weightstream.p2p.identity import open_identity
from weightstream.p2p.members import Member
from weightstream.p2p.swarm import Swarm, open_swarm
from weightstream.p2p.swarm.cargo import Cargo

MIB = 1 << 20
CHUNK = 1 << 20


def address(node: Node) -> str:
    return node.settings.peer_listen.rpartition(":")[0]


def swarm_of(node: Node) -> Swarm:
    swarm = node.exchange._parts.carrier
    assert isinstance(swarm, Swarm)
    return swarm


def cargo_of(node: Node, blob: Blob) -> Cargo:
    cargo = node.exchange._relay(blob).carried
    assert isinstance(cargo, Cargo)
    return cargo


@dataclass
class SwarmCluster(Cluster):
    """A cluster whose nodes have addresses."""

    def introduce(self, *nodes: Node) -> None:
        for node in nodes or self.nodes:
            for other in self.nodes:
                if other is not node:
                    node.told.everybody[other.name] = _member(other)
                    other.told.everybody[node.name] = _member(node)
        for node in self.nodes:
            node.told.on_change()


def _member(node: Node) -> Member:
    return Member(node.name, address(node), node.exchange.port, "")


SwarmFactory = Callable[..., SwarmCluster]


@pytest.fixture
def swarm(
    s3: S3Server,
    proxy: FaultProxy,
    store_settings: SettingsFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[SwarmFactory]:
    """Make a cluster of `count` nodes that know each other.

    Up to eight processes of it share two cores with whatever else runs there, and stand still for
    seconds. That is to cost no swarm, which a stall of 3 s does, and to split no crowd, of which
    80 ms gather what begins as one: then each part reads the origin.
    """
    pytest.importorskip("libtorrent")
    monkeypatch.setattr("weightstream.p2p.swarm.policy._STALLED_S", 6.0)
    if joining._BATCH_S < 0.5:
        monkeypatch.setattr(joining, "_BATCH_S", 0.5)
    made: list[Node] = []

    def make(count: int, **overrides: object) -> SwarmCluster:
        found = SwarmCluster(proxy, f"models/swarm-{tmp_path.name}")
        for _ in range(count):
            made.append(node(len(made), **overrides))
            found.nodes.append(made[-1])
        found.introduce()
        return found

    def node(number: int, **overrides: object) -> Node:
        host = f"127.0.0.{number + 2}"
        values: dict[str, object] = {
            "store": tmp_path / f"store{number}",
            "chunk_size": CHUNK,
            "peer_listen": f"{host}:0",
            "peer_encryption": "off",
            "peer_transport": "swarm",
            "swarm_listen": f"{host}:0",
            "deadline_s": 60.0,
        }
        settings = store_settings(**(values | overrides))
        identity = open_identity(settings)
        origin = open_origin("s3://models", settings, storage_options(proxy.url))
        budget = MemoryBudget(int(settings.memory_budget))
        store = Store.open(settings)
        told = Told()

        def source_of(blob: Blob) -> Source | None:
            return (one.source or origin) if one.allowed else None

        exchange = Exchange(
            settings,
            identity,
            store,
            SlabPool(budget),
            budget.limit_bytes,
            source_of,
            carrier=open_swarm(settings, identity),
        )
        exchange.attach(told)
        one = Node(settings, identity, origin, exchange, told, store)
        return one

    yield make
    for one in made:
        one.exchange.close()
        one.origin.close()
        if one.store is not None:
            one.store.close()
