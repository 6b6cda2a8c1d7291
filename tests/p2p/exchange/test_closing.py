"""An exchange that ends in the midst of anything ends quietly."""

import threading
import time

import pytest
from tests.conftest import LogWatch
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import MIB, ClusterFactory


@pytest.mark.parametrize("after_s", [0.0, 0.001, 0.003, 0.01, 0.03])
def test_an_exchange_that_closes_while_it_joins_ends_quietly(
    cluster: ClusterFactory, s3: S3Server, after_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[str] = []
    monkeypatch.setattr(
        threading, "excepthook", lambda args: raised.append(f"{args.thread.name}: {args.exc_value}")
    )
    nodes = cluster(3)
    blob, data = nodes.put(s3, MIB)
    assert nodes.nodes[0].load(blob) == data
    before = set(threading.enumerate())
    plan = nodes.nodes[1].exchange.plan([(blob, (blob.whole(),))])
    time.sleep(after_s)
    nodes.nodes[1].exchange.close()
    plan.close()
    until_s = time.monotonic() + 20
    begun = ("weightstream-plan", "weightstream-joining")
    while any(t.name in begun for t in set(threading.enumerate()) - before):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    assert not raised


@pytest.mark.slow
def test_an_exchange_that_closes_while_peers_send_logs_nothing(
    cluster: ClusterFactory, s3: S3Server, expect_log: LogWatch
) -> None:
    nodes = cluster(12, chunk_size=MIB)
    blob, data = nodes.put(s3, 24 * MIB)
    assert nodes.nodes[0].load(blob) == data
    for i, node in enumerate(nodes.nodes[1:]):
        plan = node.exchange.plan([(blob, (blob.whole(),))])
        until_s = time.monotonic() + 20
        while not node.exchange._client.received_bytes:
            assert time.monotonic() < until_s
            time.sleep(0.001)
        time.sleep(0.004 * i)
        node.exchange.close()
        plan.close()
        while any(t.name == "weightstream-bulk" for t in threading.enumerate()):
            assert time.monotonic() < until_s
            time.sleep(0.01)
