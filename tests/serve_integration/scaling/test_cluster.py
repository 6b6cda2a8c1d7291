"""The concurrency policy in a real Serve controller, with real replicas and requests."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.kit.ray_cluster import NodeSpec, RayCluster, wait_until

from weightstream.serve_integration import autoscaling, bounded_queue

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BURST, TARGET, IDEAL = 40, 10, 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster([NodeSpec(cpus=4)]) as cluster:
        cluster.start_serve()
        yield cluster


@pytest.fixture
def app(cluster: RayCluster) -> Iterator[str]:
    yield "scaled"
    from ray import serve

    serve.delete("scaled")


def deploy(gate: Path, **options: Any) -> None:
    """Deploy a model whose replicas are ready once the gate is there."""
    from ray import serve

    class Model:
        def __init__(self) -> None:
            while not gate.exists():
                time.sleep(0.05)

        async def __call__(self) -> str:
            await asyncio.sleep(0.1)
            return "ok"

    model: Any = serve.deployment(
        name="Model",
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_wait_loop_s=0.1,
        **options,
    )(Model)
    serve.run(model.bind(), name="scaled", route_prefix="/scaled")


class Targets:
    """Every target of the deployment that the controller had, as far as polling sees."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pytest-targets")

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            target = target_now()
            if not self.seen or self.seen[-1] != target:
                self.seen.append(target)

    def __enter__(self) -> "Targets":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30)


def target_now() -> int:
    from ray.serve.context import _get_global_client

    details: dict[str, Any] = _get_global_client().get_serve_details()
    return int(details["applications"]["scaled"]["deployments"]["Model"]["target_num_replicas"])


async def burst(url: str, count: int) -> list[tuple[int, str | None]]:
    """Ask at once; return status and Retry-After of every answer."""
    limit = aiohttp.ClientTimeout(total=90)
    async with aiohttp.ClientSession(
        timeout=limit, connector=aiohttp.TCPConnector(limit=0)
    ) as session:

        async def ask() -> tuple[int, str | None]:
            async with session.get(url) as answer:
                await answer.read()
                return answer.status, answer.headers.get("Retry-After")

        return await asyncio.gather(*(ask() for _ in range(count)))


def test_burst_at_zero_orders_the_ideal_size_before_anything_runs(
    cluster: RayCluster, app: str, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    deploy(
        gate,
        autoscaling_config=autoscaling(
            target=TARGET, max=8, scale_down_after_s=3, idle_after_s=1, observe_s=0.2
        ),
        **bounded_queue(BURST + 10, at_once=TARGET),
    )
    assert target_now() == 0
    with Targets() as targets, ThreadPoolExecutor(1) as pool:
        answers = pool.submit(asyncio.run, burst(cluster.url("/scaled"), BURST))
        wait_until(lambda: target_now() == IDEAL, "the ideal size")
        assert cluster.running(app) == []
        gate.touch()
        assert answers.result(90) == [(200, None)] * BURST
        wait_until(lambda: target_now() == 0, "back to zero")
        wait_until(lambda: cluster.replicas(app) == [], "no replica left")
    assert (max(targets.seen), targets.seen[-1]) == (IDEAL, 0)
