"""Bytes damaged on the way, and an origin that knows its objects' checksums."""

from base64 import b64encode

import pytest
from awscrt import checksums
from tests.e2e.conftest import Scene, check_message
from tests.kit import faults as f

from weightstream.errors import IntegrityError

SHARD = "model-00002-of-00003.safetensors"


def state_checksums(scene: Scene, algorithm: str) -> None:
    """Let the origin state the full-object checksums of the files as they are."""
    for name, data in scene.files.items():
        size = 8 if algorithm == "crc64nvme" else 4
        value = getattr(checksums, algorithm)(data).to_bytes(size, "big")
        header = (f"x-amz-checksum-{algorithm}", b64encode(value).decode())
        scene.proxy.checksums[f"/models/{scene.prefix}/{name}"] = header


@pytest.mark.parametrize("algorithm", ["crc64nvme", "crc32c"])
def test_a_damaged_byte_is_an_error_and_nothing_of_it_is_kept(scene: Scene, algorithm: str) -> None:
    state_checksums(scene, algorithm)
    damage = f.When(key=SHARD, ranged=True, times=None)
    scene.proxy.add(damage, f.Corrupt(at=len(scene.files[SHARD]) - 100))
    with pytest.raises(IntegrityError) as caught:
        scene.load()
    check_message(caught.value, SHARD, algorithm)
    scene.drain()
    scene.proxy.clear()
    assert scene.loads_right()
    assert scene.proxy.body_bytes(SHARD) >= len(scene.files[SHARD])


@pytest.mark.parametrize("algorithm", ["crc64nvme", "crc32c"])
def test_right_checksums_pass(scene: Scene, algorithm: str) -> None:
    state_checksums(scene, algorithm)
    assert scene.loads_right()
    asked = [e for e in scene.proxy.exchanges(f.When(method="HEAD")) if SHARD in e.path]
    assert asked


def test_a_damaged_byte_in_a_range_that_resumed(scene: Scene) -> None:
    """The pieces of one range come by two requests; the sum is over both."""
    state_checksums(scene, "crc64nvme")
    scene.use(hedge="off")
    scene.proxy.add(f.When(key=SHARD, ranged=True, nth=2), f.Reset(300_000))
    assert scene.loads_right()


def test_partly_stored_and_partly_fetched_is_checked_as_a_whole(scene: Scene) -> None:
    state_checksums(scene, "crc64nvme")
    scene.load(names=["layers.1.q.weight"])
    scene.drain()
    scene.proxy.add(f.When(key=SHARD, ranged=True, times=None), f.Corrupt(at=1_900_000))
    with pytest.raises(IntegrityError):
        scene.load()


def test_without_a_checksum_a_damaged_header_is_still_found(scene: Scene) -> None:
    scene.proxy.add(f.When(key=SHARD, ranged=True, times=None), f.Corrupt(at=3, count=4))
    with pytest.raises(ValueError, match=SHARD):  # FormatError: the length is absurd
        scene.load()
