"""Transient faults: the load goes on from the byte it reached, and its bytes are right."""

import time

import pytest
from tests.e2e.conftest import Scene, check_message
from tests.kit import faults as f

from weightstream.errors import OriginError, ProtocolError, UnavailableError

MIB = 1 << 20
WEIGHTS = f.When(key=".safetensors", method="GET", ranged=True)
FIRST_SHARD = f.When(key="model-00001", method="GET", ranged=True)

ONCE = [
    f.INTERNAL_ERROR,
    f.Status(502, "BadGateway"),
    f.SLOW_DOWN,
    f.Status(429, "TooManyRequests"),
    f.Drop(),
    f.Drop(reset=True),
    f.Reset(0),
    f.Reset(300_000),
    f.ShortBody(0),
    f.ShortBody(300_000),
    f.Length(-1000),
    f.Length(+1000),
    f.ContentRange(shift=4096),
    f.ContentRange(value="bytes nonsense"),
    f.IgnoreRange(),
    f.Stall(0.3),
    f.Stall(0.3, after_bytes=300_000),
    f.Latency(0.3),
    f.Drip(4 * MIB),
]


@pytest.mark.parametrize("fault", ONCE, ids=str)
def test_a_fault_that_strikes_some_ranges_once(scene: Scene, fault: f.Fault) -> None:
    scene.proxy.add(f.When(key=".safetensors", ranged=True, nth=2, times=2), fault)
    assert scene.loads_right()


@pytest.mark.parametrize("fault", [f.Reset(700_000), f.ShortBody(700_000)], ids=str)
def test_a_broken_range_resumes_where_it_broke(scene: Scene, fault: f.Fault) -> None:
    scene.use(hedge="off")
    scene.proxy.add(FIRST_SHARD, fault)
    assert scene.loads_right()
    asked = [e for e in scene.proxy.exchanges(FIRST_SHARD) if e.range]
    broken = next(e for e in asked if e.body_bytes < e.range[1] - e.range[0])  # type: ignore[index]
    again = [e for e in asked if e.range and e.range[1] == broken.range[1]]  # type: ignore[index]
    # An RST may overtake bytes that lie in the socket; what was sent and lost is at most that.
    assert len(again) == 2
    assert again[1].range is not None
    assert broken.range is not None
    resumed_at = again[1].range[0] - broken.range[0]
    assert 0 < resumed_at <= 700_000
    assert isinstance(fault, f.Reset) or resumed_at == 700_000
    overhead = scene.proxy.body_bytes(scene.prefix) - sum(map(len, scene.files.values()))
    assert overhead <= 700_000 - resumed_at + 100_000


def test_every_third_range_breaks(scene: Scene) -> None:
    for nth in range(1, 60, 3):
        scene.proxy.add(f.When(key=".safetensors", ranged=True, nth=nth), f.Reset(200_000))
    assert scene.loads_right()


def test_a_stalled_body_is_given_up_and_asked_for_again(scene: Scene) -> None:
    scene.use(stall_timeout_s=0.5, hedge="off")
    scene.proxy.add(WEIGHTS, f.Stall(30, after_bytes=200_000))
    started = time.monotonic()
    assert scene.loads_right()
    assert 0.4 < time.monotonic() - started < 8


def test_an_origin_that_stalls_for_good_is_named_at_the_deadline(scene: Scene) -> None:
    scene.use(stall_timeout_s=0.4, deadline_s=1.5)
    scene.proxy.add(f.When(key="model-00002", ranged=True, times=None), f.Stall(60, 1000))
    scene.proxy.add(f.When(key="model-00002", ranged=True, times=None), f.Stall(60))
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        scene.load()
    assert time.monotonic() - started < 8
    check_message(caught.value, "model-00002", "bytes ", scene.proxy.host)


@pytest.mark.parametrize(
    "fault",
    [
        f.ContentRange(shift=4096),
        f.ContentRange(value="bytes 0-0/1"),
        f.Length(-1),
        f.IgnoreRange(),
    ],
    ids=str,
)
def test_an_origin_that_always_lies_ends_in_an_error_not_in_wrong_bytes(
    scene: Scene, fault: f.Fault
) -> None:
    scene.use(deadline_s=1.5)
    scene.proxy.add(f.When(key="model-00002", ranged=True, times=None), fault)
    with pytest.raises(OriginError) as caught:
        scene.load()
    check_message(caught.value, "model-00002", "bytes ", scene.proxy.host)


def test_a_redirect_is_followed(scene: Scene) -> None:
    """Within the same host, as S3 does while a new bucket's name spreads."""
    name = "model-00001-of-00003.safetensors"
    target = f"{scene.proxy.url}/models/{scene.prefix}/{name}"
    scene.proxy.add(f.When(key=name, ranged=True, nth=1, times=1), f.Redirect(target))
    assert scene.loads_right()


def test_a_redirect_loop_ends(scene: Scene) -> None:
    scene.use(deadline_s=6.0)  # for the other files, on a slow machine
    name = "model-00001-of-00003.safetensors"
    target = f"{scene.proxy.url}/models/{scene.prefix}/{name}"
    scene.proxy.add(f.When(key=name, ranged=True, times=None), f.Redirect(target))
    with pytest.raises(ProtocolError) as caught:
        scene.load()
    check_message(caught.value, name)


def test_a_server_that_freezes_and_thaws(scene: Scene) -> None:
    """Connections stay open, nothing moves: kept connections and half-read bodies both."""
    scene.use(stall_timeout_s=0.5, deadline_s=20.0)
    frozen = f.Hook(lambda _: scene.s3.pause())
    thaw = f.Hook(lambda _: scene.s3.resume())
    scene.proxy.add(f.When(key=".safetensors", ranged=True, nth=2), frozen)
    scene.proxy.add(f.When(key=".safetensors", ranged=True, nth=6), thaw)
    try:
        assert scene.loads_right()
    finally:
        scene.s3.resume()
