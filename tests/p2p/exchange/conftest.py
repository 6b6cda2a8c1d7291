"""Exchanges of several nodes in one process, over real sockets, with one real S3 server behind.

Everything between the nodes is what it is between machines; only the members are told by hand.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.conftest import SettingsFactory
from tests.kit import models
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, storage_options

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.budget import MemoryBudget
from weightstream.cachefs.fetch.job import Attempt
from weightstream.cachefs.fetch.slabs import SlabPool
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.cachefs.store import Store
from weightstream.p2p.exchange import Exchange
from weightstream.p2p.identity import Identity, open_identity
from weightstream.p2p.members import Member
from weightstream.settings import Settings

MIB = 1 << 20


class Told:
    """A membership that is told who is there."""

    def __init__(self) -> None:
        self.everybody: dict[str, Member] = {}
        self.suspected: dict[str, str] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.is_settled = True

    def members(self) -> tuple[Member, ...]:
        return tuple(m for n, m in sorted(self.everybody.items()) if n not in self.suspected)

    def suspect(self, node: str, why: str) -> None:
        self.suspected[node] = why

    def close(self) -> None:
        return


@dataclass
class Node:
    """One node: an exchange with a store and a budget of its own."""

    settings: Settings
    identity: Identity
    origin: Origin
    exchange: Exchange
    told: Told
    store: Store | None
    allowed: bool = True
    source: Source | None = None
    """Instead of the origin."""

    @property
    def name(self) -> str:
        return self.identity.node

    def read(self, blob: Blob, extent: Extent | None = None, urgent: bool = False) -> bytes:
        """Read as an engine does, in ranges of two chunks."""
        wanted = extent or blob.whole()
        into = memoryview(bytearray(len(wanted)))
        step, done = 2 * self.settings.chunk_size, 0
        while done < len(into):
            part = into[done : done + step]
            attempt = Attempt(lambda count: None, lambda: urgent)
            self.exchange.read_into(blob, wanted.start + done, part, attempt)
            done += len(part)
        return bytes(into)

    def load(self, blob: Blob) -> bytes:
        """Read all of it, as planned."""
        plan = self.exchange.plan([(blob, (blob.whole(),))])
        try:
            return self.read(blob)
        finally:
            plan.close()


@dataclass
class Cluster:
    """Nodes by number; `load_all` has everybody load at once."""

    proxy: FaultProxy
    bucket: str
    nodes: list[Node] = field(default_factory=list)

    def put(self, s3: S3Server, size: int, name: str = "w.bin") -> tuple[Blob, bytes]:
        data = models.random_bytes(size, f"{self.bucket}/{name}")
        s3.put_files(self.bucket, {name: data})
        (blob,) = self.nodes[0].origin.list(f"s3://{self.bucket}/{name}")
        return blob, data

    def introduce(self, *nodes: Node) -> None:
        """Make everybody know everybody."""
        for node in nodes or self.nodes:
            for other in self.nodes:
                if other is not node:
                    member = Member(other.name, "127.0.0.1", other.exchange.port, "")
                    node.told.everybody[other.name] = member
                    here = Member(node.name, "127.0.0.1", node.exchange.port, "")
                    other.told.everybody[node.name] = here
        for node in self.nodes:
            node.told.on_change()

    def origin_bytes(self, blob: Blob) -> int:
        """Return what was sent, once that stands still: the proxy counts a moment later."""
        before = -1
        while before != (before := self.proxy.body_bytes(blob.name)):
            time.sleep(0.1)
        return before

    def load_all(self, blob: Blob, nodes: "list[Node] | None" = None) -> list[bytes]:
        """Return what each node read; raises when one could not."""
        chosen = self.nodes if nodes is None else nodes
        results: list[bytes | Exception] = [b""] * len(chosen)

        def load(i: int) -> None:
            try:
                results[i] = chosen[i].load(blob)
            except Exception as error:
                results[i] = error

        threads = [threading.Thread(target=load, args=(i,)) for i in range(len(chosen))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        failed = [found for found in results if isinstance(found, Exception)]
        if failed:
            raise failed[0]
        return [found for found in results if isinstance(found, bytes)]


ClusterFactory = Callable[..., Cluster]


@pytest.fixture
def cluster(
    s3: S3Server, proxy: FaultProxy, store_settings: SettingsFactory, tmp_path: Path
) -> Iterator[ClusterFactory]:
    """Make a cluster of `count` nodes that know each other."""
    made: list[Node] = []

    def make(count: int, **overrides: object) -> Cluster:
        found = Cluster(proxy, f"models/peers-{tmp_path.name}")
        for _ in range(count):
            made.append(node(len(made), **overrides))
            found.nodes.append(made[-1])
        found.introduce()
        return found

    def node(number: int, **overrides: object) -> Node:
        values: dict[str, object] = {
            "store": tmp_path / f"store{number}",
            "chunk_size": 256 << 10,
            "peer_listen": "127.0.0.1:0",
            "peer_encryption": "off",
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
            settings, identity, store, SlabPool(budget), budget.limit_bytes, source_of
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
