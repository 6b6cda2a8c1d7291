"""What a swarm brings is right, and the origin sends it once."""

import ssl
import time
from pathlib import Path

import pytest
from tests.kit.s3 import S3Server
from tests.p2p.exchange.conftest import Node
from tests.p2p.swarm.conftest import MIB, SwarmFactory, address, cargo_of, swarm_of
from tests.p2p.swarm.handshake import info_hash, shaken
from tests.p2p.swarm.test_failures import wait_until

from weightstream import metrics
from weightstream.cachefs.blob import Extent
from weightstream.p2p.identity import PEER_NAME, open_identity

_SWARMED = 'weightstream_peer_bytes_total{way="swarm_received"}'


def swarmed_bytes() -> float:
    """Return what swarms brought so far, once that stands still: it is told four times a second."""
    before = -1.0
    while before != (before := metrics.samples().get(_SWARMED, 0.0)):
        time.sleep(0.6)
    return before


@pytest.mark.parametrize("count", [2, 4])
def test_a_crowd_loads_through_the_swarm_and_the_origin_sends_it_once(
    swarm: SwarmFactory, s3: S3Server, count: int
) -> None:
    nodes = swarm(count)
    blob, data = nodes.put(s3, 24 * MIB + 12345)
    before = swarmed_bytes()
    assert nodes.load_all(blob) == [data] * count
    assert swarmed_bytes() - before >= blob.size / 2
    assert nodes.origin_bytes(blob) <= 1.1 * blob.size
    everybody = {node.name for node in nodes.nodes}
    for node in nodes.nodes:
        assert {*cargo_of(node, blob).met} == everybody - {node.name}, "somebody is not known"


def test_with_encryption_the_swarm_is_closed_to_others(
    swarm: SwarmFactory, s3: S3Server, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret of the whole cluster")
    secret.chmod(0o600)
    nodes = swarm(3, peer_encryption="on", cluster_secret_file=str(secret))
    blob, data = nodes.put(s3, 16 * MIB)
    before = swarmed_bytes()
    assert nodes.load_all(blob) == [data] * 3
    assert swarmed_bytes() - before >= blob.size / 4
    assert nodes.origin_bytes(blob) <= 1.1 * blob.size
    one, other, third = nodes.nodes
    there = address(one), swarm_of(one).port
    name = info_hash(cargo_of(one, blob)._description)
    member, nobody, stranger = stranger_context(), stranger_context(), stranger_context()
    own = third.identity.credentials(PEER_NAME)
    member.load_cert_chain(*written(tmp_path / "own", own.certificate, own.private_key))
    strange = credentials_of_another_cluster(third, tmp_path)
    stranger.load_cert_chain(*written(tmp_path / "strange", *strange))
    from_there = address(other)
    assert shaken(there, from_there, name, member)
    assert not shaken(there, from_there, name, nobody), "answered without a certificate"
    assert not shaken(there, from_there, name, stranger), "answered one of another secret"
    assert not shaken(there, from_there, name), "answered in plain text"


def stranger_context() -> ssl.SSLContext:
    """Return a client that trusts everybody."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def written(path: Path, certificate: bytes, key: bytes) -> tuple[Path, Path]:
    path.mkdir()
    (path / "certificate").write_bytes(certificate)
    (path / "key").write_bytes(key)
    return path / "certificate", path / "key"


def credentials_of_another_cluster(node: Node, tmp_path: Path) -> tuple[bytes, bytes]:
    secret = tmp_path / "another secret"
    secret.write_text("a secret of some other cluster")
    secret.chmod(0o600)
    settings = node.settings.model_copy(update={"cluster_secret_file": str(secret)})
    own = open_identity(settings).credentials(PEER_NAME)
    return own.certificate, own.private_key


def test_a_part_is_wanted_and_no_more_is_brought(swarm: SwarmFactory, s3: S3Server) -> None:
    nodes = swarm(2)
    blob, data = nodes.put(s3, 16 * MIB)
    part = Extent(3 * MIB, 7 * MIB)
    plans = [node.exchange.plan([(blob, (part,))]) for node in nodes.nodes]
    for node in nodes.nodes:
        assert node.read(blob, part) == data[part.start : part.stop]
    for plan in plans:
        plan.close()
    assert nodes.origin_bytes(blob) <= 1.3 * len(part)
    assert not any(cargo_of(nodes.nodes[0], blob).has(i) for i in (0, 1, 2, 8, 9, 15))


def test_who_comes_later_gets_it_from_the_others(swarm: SwarmFactory, s3: S3Server) -> None:
    nodes = swarm(3)
    blob, data = nodes.put(s3, 16 * MIB)
    assert nodes.load_all(blob, nodes.nodes[:2]) == [data, data]
    before, moved = nodes.origin_bytes(blob), swarmed_bytes()
    assert nodes.nodes[2].load(blob) == data
    assert nodes.origin_bytes(blob) == before
    assert swarmed_bytes() - moved >= blob.size / 2


def test_who_told_of_itself_before_it_took_part_says_so_later(
    swarm: SwarmFactory, s3: S3Server
) -> None:
    nodes = swarm(3)
    blob, data = nodes.put(s3, 16 * MIB)
    for node in nodes.nodes:  # as a reader that comes before its load's plan
        assert node.read(blob, Extent(0, MIB)) == data[:MIB]
    before = swarmed_bytes()
    plans = [node.exchange.plan([(blob, (blob.whole(),))]) for node in nodes.nodes]
    everybody = {node.name for node in nodes.nodes}
    for node in nodes.nodes:
        others = everybody - {node.name}
        met = cargo_of(node, blob).met
        wait_until(lambda met=met, others=others: {*met} == others, "all know each other")  # type: ignore[misc]
    assert [node.read(blob) for node in nodes.nodes] == [data] * 3
    for plan in plans:
        plan.close()
    assert swarmed_bytes() - before >= blob.size / 2
