"""Who takes a chunk over from a home reads it, and gives it to the swarm as a home does."""

import threading

import pytest
from tests.kit.s3 import S3Server
from tests.p2p.exchange.test_taking import slowed
from tests.p2p.swarm.conftest import CHUNK, MIB, SwarmFactory, cargo_of
from tests.p2p.swarm.test_failures import wait_until
from tests.p2p.swarm.test_swarm import swarmed_bytes

_N_CHUNKS = 24


@pytest.fixture(autouse=True)
def begin_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a node that a busy machine starts a second late be a founder still: others take nothing
    over."""
    for seconds in ("_BATCH_S", "_MOST_BATCH_S"):
        monkeypatch.setattr(f"weightstream.p2p.exchange.joining.{seconds}", 2.0)


def test_a_chunk_that_was_taken_over_is_read_once_and_comes_through_the_swarm(
    swarm: SwarmFactory, s3: S3Server
) -> None:
    nodes = swarm(3)
    blob, data = nodes.put(s3, _N_CHUNKS * CHUNK)
    sources = [slowed(node, 0.05) for node in nodes.nodes[1:]]
    sources.insert(0, slowed(nodes.nodes[0], 2.0))
    before = swarmed_bytes()
    assert nodes.load_all(blob) == [data] * 3
    slow, *others = ({start // CHUNK for start in source.begun} for source in sources)
    assert len(slow) < _N_CHUNKS / 3, "nothing was taken over"
    assert len(slow) + sum(map(len, others)) == _N_CHUNKS, "each is read by one node"
    assert set().union(slow, *others) == {*range(_N_CHUNKS)}
    assert nodes.origin_bytes(blob) <= 1.1 * blob.size
    moved = nodes.nodes[0].exchange._relay(blob).crowd._moved
    third = cargo_of(nodes.nodes[1], blob)
    given = [chunk for chunk, taker in moved.items() if taker == nodes.nodes[2].name]
    wait_until(lambda: not third.ready, "everything was checked")
    assert any(third.has(chunk) for chunk in given)
    assert swarmed_bytes() - before >= blob.size


def test_a_reader_that_waits_for_the_swarm_waits_for_its_own_node_once_that_has_taken_over(
    swarm: SwarmFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = swarm(2)
    for patience in ("_STALLED_S", "_PATIENCE_S"):  # or it would end what waits in vain
        monkeypatch.setattr(f"weightstream.p2p.swarm.policy.{patience}", 600.0)
    blob, data = nodes.put(s3, _N_CHUNKS * MIB)
    home, taker = nodes.nodes
    slowed(home, 2.0)
    source = slowed(taker, 0.3)
    found: list[list[bytes]] = []
    loader = threading.Thread(target=lambda: found.append(nodes.load_all(blob)))
    loader.start()
    wait_until(lambda: len(source.begun) > 0, "begun")
    relay, cargo = taker.exchange._relay(blob), cargo_of(taker, blob)
    chunks = [chunk for chunk in range(_N_CHUNKS) if relay.crowd.home(chunk) == home.name]
    wait_until(lambda: any(map(cargo.carries, chunks)), "in the swarm")
    parked = [flight for chunk in chunks if (flight := relay.want(chunk, False)).is_parked]
    assert parked
    loader.join(60)
    assert found == [[data] * 2]
    taken = [one for one in parked if relay.crowd.taker(one.chunk) == taker.name]
    assert taken, "nothing was taken over"
    assert all(one.from_origin for one in taken)
