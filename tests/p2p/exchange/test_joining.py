"""How a crowd comes together that does not begin at the same moment."""

import threading
import time

import pytest
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import MIB, ClusterFactory
from tests.p2p.exchange.test_taking import post, slowed

from weightstream.p2p.exchange import joining
from weightstream.p2p.exchange.crowds import pack_flags

CHUNK = 256 << 10


def test_who_says_its_word_while_others_wait_is_waited_for(
    cluster: ClusterFactory, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_s = 1.0
    monkeypatch.setattr(joining, "_BATCH_S", batch_s)
    monkeypatch.setattr(joining, "_MOST_BATCH_S", 10.0)
    monkeypatch.setattr(joining, "_BATCH_TIMES", 0.0)
    nodes = cluster(2)
    blob, _ = nodes.put(s3, 6 * MIB)
    first, source = nodes.nodes[0], slowed(nodes.nodes[0], 0.0)
    nodes.introduce()
    loader = threading.Thread(target=first.load, args=(blob,), daemon=True)
    began_s = time.monotonic()
    loader.start()
    time.sleep(batch_s / 2)
    word = {
        "node": nodes.nodes[1].name, "uri": blob.uri, "size": blob.size, "version": blob.version,
        "chunk_size": CHUNK, "held": pack_flags(bytes(24)), "reads_origin": True,
    }  # fmt: skip
    heard_s = time.monotonic()
    assert post(first, "/v1/join", word)["begun"] is False
    assert heard_s - began_s < batch_s, "or it would have begun before"
    while not source.begun and time.monotonic() < heard_s + 30:
        time.sleep(0.005)
    assert source.begun
    assert time.monotonic() - heard_s >= batch_s
    loader.join(30)
