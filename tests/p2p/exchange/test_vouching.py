"""What members say chunks are."""

import pytest
from blake3 import blake3
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import MIB, ClusterFactory

from weightstream.p2p.exchange.vouching import MOST_CHUNKS, parse_question
from weightstream.p2p.exchange.wire import WireError

CHUNK = 256 << 10


def test_a_member_tells_the_hashes_of_what_it_has(cluster: ClusterFactory, s3: S3Server) -> None:
    nodes = cluster(2)
    blob, data = nodes.put(s3, MIB)
    one, other = nodes.nodes
    asking = other.exchange._relay(blob)
    assert asking.ask_digests(one.name, [0, 1]).digests == {}, "it knows nothing of the blob"
    assert one.load(blob) == data
    vouched = asking.ask_digests(one.name, [0, 3, 4, 1 << 40])
    assert vouched.digests == {
        i: blake3(data[i * CHUNK : (i + 1) * CHUNK]).digest() for i in (0, 3)
    }
    assert not vouched.stands_by, "there is no swarm in which it passed anything on"


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"blob": 1, "chunk_size": CHUNK, "chunks": [0]},
        {"blob": "b", "chunk_size": "1", "chunks": [0]},
        {"blob": "b", "chunk_size": CHUNK, "chunks": {"0": 1}},
        {"blob": "b", "chunk_size": CHUNK, "chunks": [-1]},
        {"blob": "b", "chunk_size": CHUNK, "chunks": ["0"]},
        {"blob": "b", "chunk_size": CHUNK, "chunks": [0] * (MOST_CHUNKS + 1)},
    ],
)
def test_a_question_that_is_none_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(WireError):
        parse_question(message)
