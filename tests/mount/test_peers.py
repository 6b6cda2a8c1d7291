"""Peers behind a mount that die, fall silent or dawdle in mid-read (R24).

The node that mounts has an agent with peers. What a reader sees are the right bytes, always; the
origin sends what no peer could give, once.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.kit.agents import Node, make_nodes, wait_acquainted
from tests.kit.bridge import Bridge
from tests.kit.models import random_bytes
from tests.kit.processes import Child, start_python
from tests.mount.conftest import PATIENCE_S, Bucket

pytestmark = pytest.mark.fuse
MIB = 1 << 20
SIZE = 24 * MIB
PART = 8 * MIB

Nodes = Callable[[int], list[Node]]

_READ = """
import hashlib, sys
with open(sys.argv[1], "rb", buffering=0) as file:
    emit("open")
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
emit(digest.hexdigest())
"""


@pytest.fixture
def nodes(bucket: Bucket, tmp_path: Path) -> Iterator[Nodes]:
    """Make nodes; the first is the one on which `bucket` mounts."""
    made: list[Node] = []
    bucket.options["hedge"] = "off"

    def make(count: int) -> list[Node]:
        made.extend(make_nodes(count, tmp_path, os.environ | bucket.env))
        bucket.options |= {"store": made[0].store, "run_directory": made[0].run_directory}
        return made

    yield make
    for mounted in bucket.mounts:
        mounted.end()
    for node in made:
        node.end()


def start(nodes: list[Node]) -> None:
    for node in nodes:
        node.start("--allow", "s3://models")
    wait_acquainted(nodes)


def give(bucket: Bucket, data: bytes, *holders: Node) -> None:
    """Put a file into the bucket and into the stores of some nodes; forget what that cost."""
    bucket.put("w.bin", data)
    for holder in holders:
        with holder.prefetch(bucket.uri) as child:
            assert child.result().returncode == 0
    bucket.proxy.clear()


def reading(bucket: Bucket) -> Child:
    """Mount, and begin to read the file."""
    return start_python(_READ, bucket.mount().path / "w.bin", env=bucket.env)


def sent(bucket: Bucket) -> int:
    """Return what the origin sent, once that stands still: the proxy counts a moment later."""
    before = -1
    while before != (before := bucket.sent("w.bin")):
        time.sleep(0.1)
    return before


def test_r24_what_a_peer_holds_does_not_come_from_the_origin(bucket: Bucket, nodes: Nodes) -> None:
    here, there = made = nodes(2)
    data = random_bytes(SIZE, "r24-warm")
    start(made)
    give(bucket, data, there)
    with reading(bucket) as reader:
        assert reader.result().value == hashlib.sha256(data).hexdigest()
    assert sent(bucket) == 0
    assert here.peers()["received"] == SIZE


def test_r24_a_peer_dies_in_mid_read(bucket: Bucket, nodes: Nodes) -> None:
    here, there = made = nodes(2)
    data = random_bytes(SIZE, "r24-dies")
    with Bridge(there.address) as bridge:
        here.env["WEIGHTSTREAM_PEERS"] = bridge.address
        start(made)
        give(bucket, data, there)
        bridge.rate_bytes_s = 8 * MIB
        with reading(bucket) as reader:
            reader.wait_for(lambda: here.peers()["received"] >= PART)
            there.agent.kill()
            assert reader.result().value == hashlib.sha256(data).hexdigest()
    received = here.peers()["received"]
    assert PART <= received < SIZE, "nothing was in flight: the test proves nothing"
    assert sent(bucket) <= SIZE - received


def test_r24_a_peer_falls_silent_in_mid_read(bucket: Bucket, nodes: Nodes) -> None:
    here, there = made = nodes(2)
    data = random_bytes(SIZE, "r24-silent")
    with Bridge(there.address) as bridge:
        here.env["WEIGHTSTREAM_PEERS"] = bridge.address
        start(made)
        give(bucket, data, there)
        bridge.rate_bytes_s = 8 * MIB
        with reading(bucket) as reader:
            reader.wait_for(lambda: here.peers()["received"] >= PART)
            bridge.passes.clear()
            assert reader.result().value == hashlib.sha256(data).hexdigest()
    received = here.peers()["received"]
    assert PART <= received < SIZE, "nothing was in flight: the test proves nothing"
    assert sent(bucket) <= SIZE - received


def test_r24_a_peer_that_dawdles_is_not_waited_for(bucket: Bucket, nodes: Nodes) -> None:
    here, slow, *others = made = nodes(4)
    data = random_bytes(SIZE, "r24-slow")
    with Bridge(slow.address) as bridge:
        addresses = [bridge.address, *(node.address for node in others)]
        here.env["WEIGHTSTREAM_PEERS"] = ",".join(addresses)
        for node in made:
            node.env |= {"WEIGHTSTREAM_CHUNK_SIZE": "4MiB", "WEIGHTSTREAM_DEADLINE_S": "60"}
        bucket.options |= {"chunk_size": 4 * MIB, "range_size": 4 * MIB, "deadline_s": 60.0}
        start(made)
        give(bucket, data, *others, slow)  # who comes is given by whoever came last
        bridge.rate_bytes_s = 48 << 10  # 85 s for a chunk, and three TLS records a second
        with reading(bucket) as reader:
            assert reader.result(PATIENCE_S).value == hashlib.sha256(data).hexdigest()
    assert sent(bucket) == 0


def test_r24_a_peer_whose_disk_rots_is_no_source_of_wrong_bytes(
    bucket: Bucket, nodes: Nodes
) -> None:
    _, there = made = nodes(2)
    data = random_bytes(SIZE, "r24-rots")
    start(made)
    give(bucket, data, there)
    (stored,) = [path for path in there.store.rglob("*") if path.stat().st_size >= SIZE]
    with stored.open("r+b") as file:
        for chunk in range(0, SIZE // MIB, 2):
            file.seek(chunk * MIB + 12345)
            file.write(bytes([data[chunk * MIB + 12345] ^ 1]))
    there.agent.kill()  # it would serve from memory
    there.start("--allow", "s3://models")
    wait_acquainted(made)
    with reading(bucket) as reader:
        assert reader.result().value == hashlib.sha256(data).hexdigest()
    assert SIZE // 2 <= sent(bucket) <= SIZE, "what is rotten comes from the origin, once"


def test_r24_ones_own_agent_is_killed_in_mid_read(bucket: Bucket, nodes: Nodes) -> None:
    here, there = made = nodes(2)
    data = random_bytes(SIZE, "r24-own")
    with Bridge(there.address) as bridge:
        here.env["WEIGHTSTREAM_PEERS"] = bridge.address
        start(made)
        give(bucket, data, there)
        bridge.rate_bytes_s = 8 * MIB
        with reading(bucket) as reader:
            reader.wait_for(lambda: here.peers()["received"] >= PART)
            here.agent.kill()
            assert reader.result().value == hashlib.sha256(data).hexdigest()
    assert 0 < sent(bucket) <= SIZE - PART // 2
