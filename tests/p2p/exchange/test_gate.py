"""What the gate does about an origin that is slow."""

import pytest
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import MIB, ClusterFactory
from tests.p2p.exchange.test_taking import Starved

from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch.job import Attempt
from weightstream.cachefs.fetch.source import Source, Transfer
from weightstream.p2p.exchange.flights import Flight
from weightstream.p2p.exchange.origin_reader import Split

BLOB = Blob("s3://b/w.bin", 1000, "v1")


def test_a_late_fault_is_read_in_parts_from_where_it_is(
    cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(1, chunk_size=2 * MIB)
    blob, data = nodes.put(s3, 2 * MIB)
    starved = nodes.nodes[0].source = Starved(nodes.nodes[0].origin)
    into = memoryview(bytearray(blob.size))
    nodes.nodes[0].exchange.read_into(blob, 0, into, Attempt(lambda count: None, lambda: True))
    assert bytes(into) == data
    first, *others = starved.begun
    assert first == 0
    assert len(others) == 4
    assert 0 < min(others) < MIB, "what had come is not read again"


class Noting:
    """A source that notes whether who reads shares its link."""

    name = "noting"

    def __init__(self, source: Source) -> None:
        self._source = source
        self.shared: set[bool] = set()

    def read_into(self, blob: Blob, start: int, into: memoryview, transfer: Transfer) -> None:
        self.shared.add(transfer.shares_link)
        self._source.read_into(blob, start, into, transfer)


@pytest.mark.parametrize(("count", "shares"), [(1, False), (3, True)])
def test_a_crowd_shares_the_origins_link(
    count: int, shares: bool, cluster: ClusterFactory, s3: S3Server
) -> None:
    nodes = cluster(count)
    blob, data = nodes.put(s3, 6 * MIB)
    notings = [Noting(node.origin) for node in nodes.nodes]
    for node, noting in zip(nodes.nodes, notings, strict=True):
        node.source = noting  # of all: others may take everything over from one that starts late
    assert nodes.load_all(blob) == [data] * count
    shared = set().union(*(noting.shared for noting in notings))
    assert shares in shared
    assert count > 1 or shared == {False}


def test_parts_advance_a_flight_by_what_has_no_gap() -> None:
    flight = Flight(BLOB, 0, Extent(0, 1000))
    flight.advance(200)
    parts = Split(flight, 4)
    assert [parts.bounds(i) for i in range(4)] == [(200, 400), (400, 600), (600, 800), (800, 1000)]
    parts.advance(1, 200)
    assert flight.position == 200
    parts.advance(0, 100)
    assert flight.position == 300
    parts.advance(0, 100)
    assert flight.position == 600
    parts.advance(3, 200)
    parts.advance(2, 200)
    assert flight.position == 1000
