"""Exchanges against a model, while nodes come, go, die and return, and the object is replaced.

Everything is real but the membership, which the machine tells: sockets between the nodes, engines,
stores, an S3 server behind a proxy that is slow enough for things to happen in mid-transfer. Reads
run aside; what may become of each is known when it ends:

* It gives exactly the bytes of the version that it was asked for.
* It fails only if its own node was killed, or if the origin could not give that version at some
  time of the read and no node that had all of it was there throughout. The error names the file.
* It ends.

When nothing runs any more, a node's memory is what its landed chunks take, and nothing when it is
closed. Of a version under which nothing went wrong the origin sent each chunk at most twice, and
over a whole run 1.2 times at most.

`MODEL_EXAMPLES=200 make test-all ARGS=tests/p2p/test_model.py` tries more than others do.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.conftest import SettingsFactory
from tests.kit import faults as f
from tests.kit.models import random_bytes
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, storage_options
from tests.p2p.exchange.conftest import Told

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, Priority, Wanted
from weightstream.cachefs.fetch.job import Attempt
from weightstream.cachefs.origin import Origin, open_origin
from weightstream.cachefs.prefetch import SlabLanding
from weightstream.cachefs.store import Store
from weightstream.errors import WeightstreamError
from weightstream.p2p.exchange import Exchange
from weightstream.p2p.identity import open_identity
from weightstream.p2p.members import Member
from weightstream.settings import Settings

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "30"))
STEPS = 15
PATIENCE_S = 60.0
CHUNK = 64 << 10
SLAB = 1 << 20
RATE_BYTES_S = 2 << 20
MOST_NODES = 4
MOST_READS = 8

nodes = st.integers(0, MOST_NODES - 1)


@dataclass(frozen=True, slots=True)
class Version:
    """The object as it once was."""

    blob: Blob
    data: bytes


class Node:
    """A node in this process: what an agent has, without its sockets for clients."""

    def __init__(self, settings: Settings, proxy_url: str, keeps: bool) -> None:
        self.settings = settings
        self.origin: Origin = open_origin("s3://models", settings, storage_options(proxy_url))
        self.engine = Engine(settings)
        self.store = Store.open(settings) if keeps else None
        self.told = Told()
        identity = open_identity(settings)
        self.name = identity.node
        self.exchange = Exchange(
            settings,
            identity,
            self.store,
            self.engine.slabs,
            self.engine.budget.limit_bytes,
            lambda blob: self.origin,
        )
        self.exchange.attach(self.told)
        self.member = Member(self.name, "127.0.0.1", self.exchange.port, "")

    def read(self, blob: Blob, extent: Extent, urgent: bool) -> bytes:
        """Read a range; try again, as an engine does, what fails for a moment."""
        into = memoryview(bytearray(len(extent)))
        until_s = time.monotonic() + self.settings.deadline_s
        while True:
            try:
                attempt = Attempt(lambda count: None, lambda: urgent)
                self.exchange.read_into(blob, extent.start, into, attempt)
                return bytes(into)
            except WeightstreamError as error:
                if not error.transient or time.monotonic() > until_s:
                    raise
                time.sleep(0.1)

    def load(self, blob: Blob) -> bytes:
        """Read all of it as planned; a node with a store keeps it there."""
        if self.store is None:
            plan = self.exchange.plan([(blob, (blob.whole(),))])
            try:
                return self.read(blob, blob.whole(), urgent=False)
            finally:
                plan.close()
        while (kept := self.kept(blob)) is None:
            landing = SlabLanding(self.engine.slabs)
            wanted = Wanted(blob, landing, (blob.whole(),), Priority.BACKGROUND)
            with self.engine.start([wanted], self.exchange, self.store) as flow:
                flow.join()
            assert self.engine.write_back.drain(PATIENCE_S)
        return kept

    def kept(self, blob: Blob) -> bytes | None:
        """Return what the store has, once it has all."""
        stored = self.store.find_blob(blob) if self.store else None
        if stored is None:
            return None
        with stored:
            return bytes(stored.map()[:]) if stored.complete else None

    def knows(self) -> set[str]:
        """Return whom it may ask for a chunk, itself among them."""
        return {member.node for member in self.told.members()} | {self.name}

    def is_in_balance(self) -> bool:
        """Say that the budget is charged for what has landed, and for nothing else."""
        self.engine.slabs.trim()
        return self.engine.budget.used_bytes == SLAB * len(self.exchange._shelf._landed)

    def vanish(self) -> None:
        """End every connection, as a kill does: this is what the others see of it."""
        self.exchange._server.close()
        self.exchange._client.close()

    def close(self) -> None:
        """Close, once nothing moves any more; no memory may be left behind."""
        assert until(lambda: not running("weightstream-plan", "weightstream-joining"))
        assert until(self.is_in_balance)
        self.exchange.close()
        assert self.engine.write_back.drain(PATIENCE_S)
        assert until(self.is_in_balance)
        assert self.engine.budget.used_bytes == 0
        self.origin.close()
        if self.store is not None:
            self.store.close()


@dataclass(slots=True)
class Egress:
    """What the origin sent of versions under which nothing went wrong, and what it had to send."""

    sent_bytes: int = 0
    needed_bytes: int = 0


@dataclass(eq=False, slots=True)
class Read:
    """One that runs, or ran."""

    node: Node
    version: Version
    extent: Extent
    holders: set[str]
    """Who has had all of it, and was known to the reader, since the read began."""
    is_excused: bool
    """The origin could not give it, at some time since it began."""
    thread: threading.Thread = field(init=False)
    is_cut_off: bool = False
    found: bytes | None = None
    error: Exception | None = None

    def begin(self, call: Callable[[], bytes]) -> None:
        """Run aside."""

        def run() -> None:
            try:
                self.found = call()
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True, name="weightstream-model")
        self.thread.start()

    def judge(self) -> None:
        """Wait for the end; fail when it is none that the model allows."""
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "it hangs"
        if self.error is None:
            wanted = self.version.data[self.extent.start : self.extent.stop]
            assert self.found == wanted, "wrong bytes"
            return
        if not isinstance(self.error, WeightstreamError):
            raise self.error
        if self.is_cut_off:
            return
        if not self.is_excused or self.holders & self.node.knows():
            raise self.error
        assert "w.bin" in str(self.error)


def until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition; False when it does not come true in a long time."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.02)
    return True


def running(*names: str) -> set[threading.Thread]:
    """Return the threads whose names begin so."""
    return {thread for thread in threading.enumerate() if thread.name.startswith(names)}


class Peers(RuleBasedStateMachine):
    """Up to four nodes by number, one object in its versions, and the reads that run."""

    def __init__(
        self, s3: S3Server, make_settings: SettingsFactory, folder: Path, egress: Egress
    ) -> None:
        super().__init__()
        self.egress = egress
        self.s3 = s3
        self.make_settings = make_settings
        self.folder = folder
        self.prefix = f"models/{folder.name}"
        self.nodes: dict[int, Node] = {}
        self.keeps: dict[int, bool] = {}
        self.reads: list[Read] = []
        self.holds: dict[str, set[Blob]] = {}
        self.versions: list[Version] = []
        self.is_out = False
        self.is_peaceful = False
        self.is_calm = False
        self.sent_before = 0
        self.proxy = FaultProxy(s3.address).__enter__()
        self.proxy.add(f.When(ranged=True, times=None), f.Drip(RATE_BYTES_S))
        refused = f.When(ranged=True, times=None, where=lambda request: self.is_out)
        self.proxy.add(refused, f.FORBIDDEN)
        self.lister = open_origin("s3://models", make_settings(), storage_options(s3.url))
        self.replace(chunks=10, tail=777, waits=False)

    # Nodes

    def open_node(self, number: int) -> None:
        settings = self.make_settings(
            store=self.folder / f"store{number}",
            chunk_size=CHUNK,
            range_size=4 * CHUNK,
            memory_budget=48 << 20,
            peer_listen="127.0.0.1:0",
            peer_encryption="off",
            hedge="off",
        )
        self.nodes[number] = Node(settings, self.proxy.url, self.keeps[number])

    def close_node(self, number: int, is_killed: bool) -> None:
        """Have a node end: killed in the midst of whatever it does, or when its reads are done."""
        node = self.nodes.pop(number)
        for read in self.reads:
            read.is_cut_off |= is_killed and read.node is node
            read.holders.discard(node.name)
        node.vanish() if is_killed else node.exchange.drain()
        for read in [read for read in self.reads if read.node is node]:
            self.finish(read)
        node.close()
        self.is_calm = False

    @initialize(
        keeps=st.lists(st.booleans(), min_size=2, max_size=MOST_NODES),
        is_peaceful=st.sampled_from([True, False, False]),
    )
    def start(self, keeps: list[bool], is_peaceful: bool) -> None:
        self.is_peaceful = is_peaceful
        for number, keep in enumerate(keeps):
            self.join(number, keep, is_alone=False)
        self.is_calm = True

    @rule(number=nodes, keeps=st.booleans(), is_alone=st.booleans())
    def join(self, number: int, keeps: bool, is_alone: bool) -> None:
        if number in self.nodes:
            return
        self.keeps.setdefault(number, keeps)
        self.open_node(number)
        if is_alone and not self.is_peaceful:
            self.is_calm = False
        else:
            self.acquaint()

    @rule()
    def acquaint(self) -> None:
        """Let heartbeats have their say: who lives is known to all, who does not to nobody."""
        self.is_calm &= not self.suspects()
        for node in self.nodes.values():
            others = {n.name: n.member for n in self.nodes.values() if n is not node}
            node.told.everybody = others
            node.told.suspected.clear()
            node.told.on_change()

    @precondition(lambda self: not self.is_peaceful)
    @rule(number=nodes)
    def leave(self, number: int) -> None:
        if number in self.nodes:
            self.close_node(number, is_killed=False)
            self.acquaint()

    @precondition(lambda self: not self.is_peaceful)
    @rule(number=nodes)
    def cut_off(self, number: int) -> None:
        """It is gone, and nobody was told."""
        if number in self.nodes:
            self.close_node(number, is_killed=True)

    @precondition(lambda self: not self.is_peaceful and any(self.keeps.values()))
    @rule(number=nodes)
    def restart(self, number: int) -> None:
        if self.keeps.get(number):
            if number in self.nodes:
                self.close_node(number, is_killed=True)
            self.open_node(number)
            self.acquaint()

    # The origin

    @rule(chunks=st.integers(5, 20), tail=st.integers(0, CHUNK - 1), waits=st.booleans())
    def replace(self, chunks: int, tail: int, waits: bool) -> None:
        if waits:
            self.settle()
        name = f"{self.prefix} {len(self.versions)}"
        data = random_bytes(chunks * CHUNK + tail, name)
        self.check_egress()
        for read in self.reads:
            read.is_excused = True
        self.s3.put_files(self.prefix, {"w.bin": data})
        (blob,) = self.lister.list(f"s3://{self.prefix}/w.bin")
        self.versions.append(Version(blob, data))
        self.is_calm = not self.reads and not self.is_out
        self.sent_before = len(self.proxy.exchanges())

    @precondition(
        lambda self: not self.is_peaceful and not self.is_out and any(self.holds.values())
    )
    @rule()
    def fail_origin(self) -> None:
        self.is_out, self.is_calm = True, False
        for read in self.reads:
            read.is_excused = True

    @precondition(lambda self: self.is_out)
    @rule()
    def restore_origin(self) -> None:
        self.settle()  # who comes later would share the failure of who came before
        self.is_out = False

    # Reads

    def begin(self, number: int, back: int, extent: Extent | None) -> Read | None:
        if number not in self.nodes:
            return None
        if len(self.reads) >= MOST_READS:
            self.finish(self.reads[0])
        node = self.nodes[number]
        version = self.versions[max(0, len(self.versions) - 1 - back)]
        blob = version.blob
        holders = {name for name, blobs in self.holds.items() if blob in blobs}
        alive = {node.name for node in self.nodes.values()}
        is_excused = self.is_out or version is not self.versions[-1]
        read = Read(
            node, version, extent or blob.whole(), holders & alive & node.knows(), is_excused
        )
        self.reads.append(read)
        return read

    @rule(number=nodes, back=st.sampled_from([0, 0, 0, 1]))
    def load(self, number: int, back: int) -> None:
        read = self.begin(number, back, None)
        if read is not None:
            read.begin(lambda: read.node.load(read.version.blob))

    @rule(
        number=nodes,
        back=st.sampled_from([0, 0, 0, 1]),
        at=st.integers(0, 20 * CHUNK),
        length=st.integers(1, 6 * CHUNK),
        urgent=st.booleans(),
    )
    def read(self, number: int, back: int, at: int, length: int, urgent: bool) -> None:
        size = self.versions[max(0, len(self.versions) - 1 - back)].blob.size
        start = at % size
        read = self.begin(number, back, Extent(start, min(start + length, size)))
        if read is not None:
            read.begin(lambda: read.node.read(read.version.blob, read.extent, urgent))

    @precondition(lambda self: len(self.nodes) > 1)
    @rule()
    def crowd(self) -> None:
        for number in tuple(self.nodes):
            self.load(number, 0)

    @precondition(lambda self: self.reads)
    @rule()
    def settle(self) -> None:
        """Let everything come to rest."""
        for read in tuple(self.reads):
            self.finish(read)
        for number, node in self.nodes.items():
            assert until(node.is_in_balance), f"memory of node {number} is not where it should be"

    def finish(self, read: Read) -> None:
        self.reads.remove(read)
        read.judge()
        node, blob = read.node, read.version.blob
        if not read.is_cut_off and node.kept(blob) is not None:
            self.holds.setdefault(node.name, set()).add(blob)

    # Egress

    def suspects(self) -> bool:
        return any(node.told.suspected for node in self.nodes.values())

    def check_egress(self) -> None:
        """Of a version under which nobody died and nothing failed: how often was it sent?"""
        if not self.is_calm or self.reads or self.suspects():
            return  # a suspect: on a busy machine somebody was silent for a second
        blob = self.versions[-1].blob
        sent: Counter[int] = Counter()
        assert until(lambda: all(exchange.ended_s for exchange in self.proxy.exchanges()))
        for exchange in self.proxy.exchanges()[self.sent_before :]:
            if exchange.range and exchange.status < 300:
                sent[exchange.range[0] // CHUNK] += exchange.body_bytes
        needed = {i: min(CHUNK, blob.size - i * CHUNK) for i in sent}
        assert all(sent[i] <= 2 * needed[i] for i in sent)
        self.egress.sent_bytes += sent.total()
        self.egress.needed_bytes += sum(needed.values())

    def teardown(self) -> None:
        try:
            self.settle()
            self.check_egress()
        finally:
            for number in tuple(self.nodes):
                self.close_node(number, is_killed=True)
            self.lister.close()
            self.proxy.__exit__(None, None, None)


@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * EXAMPLES)
def test_model(s3: S3Server, store_settings: SettingsFactory, tmp_path: Path) -> None:
    before = running("weightstream")
    egress = Egress()

    class Machine(Peers):
        count = 0

        def __init__(self) -> None:
            Machine.count += 1
            folder = tmp_path / f"peers{Machine.count}"
            super().__init__(s3, store_settings, folder, egress)

    run_state_machine_as_test(
        Machine,
        settings=hypothesis_settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            phases=[
                Phase.explicit,
                Phase.reuse,
                Phase.generate,
            ],  # what depends on time won't shrink
        ),
    )
    assert 0 < egress.sent_bytes <= 1.2 * egress.needed_bytes
    assert until(lambda: not running("weightstream") - before), "threads are left behind"
