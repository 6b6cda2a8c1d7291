"""Loads through an agent: right bytes, once over the wire, and what an agent's death costs."""

from collections.abc import Callable

import pytest
from tests.cachefs.agent.conftest import AgentProcess
from tests.e2e.conftest import Scene
from tests.kit import faults as f
from tests.kit import jobs, models
from tests.kit.forked import Forked

MIB = 1 << 20

StartAgent = Callable[..., AgentProcess]


def expected(scene: Scene) -> str:
    return jobs.digest(models.tensors(scene.files))


def test_a_load_gets_its_bytes_through_the_agent(scene: Scene, start_agent: StartAgent) -> None:
    start_agent()
    with Forked(jobs.load, scene.uri, env=scene.env) as loading:
        outcome = loading.result()
    assert outcome.digest == expected(scene)
    assert outcome.bytes_by_source == {"agent": scene.size}


@pytest.mark.parametrize("write_back", ["on", "off"])
def test_an_agent_killed_in_mid_load_costs_nothing_but_that(
    scene: Scene, start_agent: StartAgent, write_back: str
) -> None:
    scene.put(models.sharded(3, 48 * MIB, seed=scene.prefix))
    scene.use(write_back=write_back)
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(30 * MIB))
    agent = start_agent()
    with Forked(jobs.load, scene.uri, env=scene.env) as loading:
        loading.wait_for(lambda: scene.proxy.body_bytes(".safetensors") > scene.size // 4)
        agent.kill()
        outcome = loading.result()
    assert outcome.digest == expected(scene)
    assert outcome.bytes_by_source["agent"] > 0
    assert outcome.bytes_by_source["origin"] > 0
