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
from weightstream.serve_integration.scaling.options import POLICY

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


def deploy(gate: Path, name: str = "scaled", **options: Any) -> None:
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
    serve.run(model.bind(), name=name, route_prefix=f"/{name}")


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


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(
    cluster: RayCluster, app: str, tmp_path: Path
) -> None:
    gate, waiting, came = tmp_path / "gate", 5, 12
    deploy(
        gate,
        autoscaling_config=autoscaling(target=TARGET, max=8),
        **bounded_queue(waiting, at_once=TARGET, retry_after_s=7),
    )
    answers: list[tuple[int, str | None]] = []

    async def ask() -> None:
        for answer in asyncio.as_completed(
            [asyncio.create_task(burst(cluster.url("/scaled"), 1)) for _ in range(came)]
        ):
            answers.extend(await answer)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(asyncio.run, ask())
        wait_until(lambda: len(answers) == came - waiting, "those that are too many")
        assert answers == [(429, "7")] * (came - waiting)
        assert cluster.running(app) == []
        gate.touch()
        asked.result(90)
    assert answers[came - waiting :] == [(200, None)] * waiting


def test_requests_weigh_what_their_replicas_say(
    cluster: RayCluster, app: str, tmp_path: Path
) -> None:
    from ray import serve

    over, each, running = tmp_path / "over", 100, 3

    class Model:
        def __init__(self) -> None:
            self.tokens = 0

        async def __call__(self) -> str:
            self.tokens += each
            while not over.exists():  # noqa: ASYNC110 - the test is another process
                await asyncio.sleep(0.05)
            self.tokens -= each
            return "ok"

        def record_autoscaling_stats(self) -> dict[str, float]:
            return {"tokens": float(self.tokens)}

    model: Any = serve.deployment(
        name="Model",
        ray_actor_options={"num_cpus": 0.1},
        autoscaling_config=autoscaling(
            target=TARGET, min=1, max=8, calm_s=1, target_tokens=each / 2
        ),
        **bounded_queue(BURST, at_once=TARGET),
    )(Model)
    serve.run(model.bind(), name="scaled", route_prefix="/scaled")
    assert target_now() == 1
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(asyncio.run, burst(cluster.url("/scaled"), running))
        try:
            wait_until(lambda: target_now() == 2 * running, "two replicas for each request")
        finally:
            over.touch()
        assert answers.result(90) == [(200, None)] * running


def app_that_cannot_be(_: dict[str, str]) -> Any:
    """Build an application as a configuration file's `import_path` names it."""
    from ray import serve

    class Model:
        pass

    wrong: Any = serve.deployment(Model, autoscaling_config=autoscaling(target=0, max=8))
    return wrong.bind()


def test_wishes_that_cannot_be_are_refused_at_deploy_time(
    cluster: RayCluster, app: str, tmp_path: Path
) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    client: Any = _get_global_client()

    def found() -> dict[str, Any]:
        return dict(client.get_serve_details()["applications"].get("wrong", {}))

    (gate := tmp_path / "gate").touch()
    deploy(gate, autoscaling_config=autoscaling(target=TARGET, min=1, max=8))
    wrong = ServeApplicationSchema(
        name="wrong", route_prefix="/wrong", import_path=f"{__name__}:app_that_cannot_be"
    )
    client.deploy_apps(ServeDeploySchema(applications=[wrong]))
    try:
        wait_until(lambda: found().get("status") == "DEPLOY_FAILED", "the refusal")
        assert "bad scaling policy: target is 0; it is a number above 0" in found()["message"]
        assert found()["deployments"] == {}
        assert asyncio.run(burst(cluster.url("/scaled"), 3)) == [(200, None)] * 3
    finally:
        serve.delete("wrong")


@pytest.mark.parametrize("wrong", [{"target": 0}, {"headroon": 1}, {"max": "many"}])
def test_wishes_that_come_past_autoscaling_stop_nothing(
    cluster: RayCluster, app: str, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    """Raised in the controller, they would keep every application from ever changing again."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    (gate := tmp_path / "gate").touch()
    wishes = {"target": 2, "min": 0, "max": 8} | wrong
    config = AutoscalingConfig(
        min_replicas=0,
        max_replicas=8,
        policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs=wishes),
    )
    deploy(gate, autoscaling_config=config, name="wrong")
    try:
        assert asyncio.run(burst(cluster.url("/wrong"), 3)) == [(200, None)] * 3
        assert len(cluster.running("wrong")) == 1
        deploy(gate, autoscaling_config=autoscaling(target=TARGET, min=1, max=8))
        assert asyncio.run(burst(cluster.url("/scaled"), 3)) == [(200, None)] * 3
    finally:
        serve.delete("wrong")
