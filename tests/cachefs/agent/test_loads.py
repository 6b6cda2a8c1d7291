"""Loads through an agent: right bytes, once over the wire, and what an agent's death costs."""

import os
import signal
import time
from collections.abc import Callable

import pytest
from tests.cachefs.agent.conftest import AgentProcess
from tests.e2e.conftest import Scene
from tests.kit import faults as f
from tests.kit import jobs, models
from tests.kit.forked import Forked

from weightstream.cachefs.agent.asking import _UnixConnection
from weightstream.cachefs.agent.client import find_agent

MIB = 1 << 20

StartAgent = Callable[..., AgentProcess]


def expected(scene: Scene) -> str:
    return jobs.digest(models.tensors(scene.files))


def metrics(scene: Scene) -> str:
    connection = _UnixConnection(scene.settings.run_directory)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


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


@pytest.mark.slow
def test_eight_processes_and_one_agent_ask_the_origin_once(
    scene: Scene, start_agent: StartAgent
) -> None:
    scene.put(models.sharded(3, 48 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(20 * MIB))
    start_agent()
    started = [Forked(jobs.load, scene.uri, env=scene.env) for _ in range(8)]
    outcomes = []
    for one in started:
        with one:
            outcomes.append(one.result())
    assert {outcome.digest for outcome in outcomes} == {expected(scene)}
    assert sum(outcome.bytes_by_source.get("origin", 0) for outcome in outcomes) == 0
    assert scene.proxy.body_bytes(".safetensors") <= 1.05 * scene.size


@pytest.mark.slow
def test_clients_come_back_to_an_agent_that_started_again(
    scene: Scene, start_agent: StartAgent
) -> None:
    scene.put(models.sharded(3, 48 * MIB, seed=scene.prefix))
    scene.use(write_back="off", concurrency=2)
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(4 * MIB))
    agent = start_agent()
    with Forked(jobs.load, scene.uri, env=scene.env) as loading:
        loading.wait_for(lambda: scene.proxy.body_bytes(".safetensors") > 4 * MIB)
        agent.kill()
        again = start_agent()
        outcome = loading.result()
    assert outcome.digest == expected(scene)
    assert outcome.bytes_by_source["origin"] > 0
    given = "weightstream_agent_ranges_total"
    ranges = [line for line in metrics(scene).splitlines() if line.startswith(f"{given} ")]
    assert float(ranges[0].split()[1]) > 0
    assert again.terminate() == 0


@pytest.mark.slow
def test_a_frozen_agent_is_given_up(scene: Scene, start_agent: StartAgent) -> None:
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(2 * MIB))
    agent = start_agent()
    with Forked(jobs.load, scene.uri, env=scene.env) as loading:
        loading.wait_for(lambda: scene.proxy.body_bytes(".safetensors") > 2 * MIB)
        os.kill(agent.pid, signal.SIGSTOP)
        outcome = loading.result()
    agent.kill()
    assert outcome.digest == expected(scene)
    assert outcome.bytes_by_source["origin"] > 0


def test_an_agent_without_credentials_leaves_the_load_to_its_own(
    scene: Scene, start_agent: StartAgent
) -> None:
    env = {name: value for name, value in scene.env.items() if "KEY" not in name}
    with AgentProcess(env) as agent:
        agent.wait_ready()
        with Forked(jobs.load, scene.uri, env=scene.env) as loading:
            outcome = loading.result()
        assert agent.terminate() == 0
    assert outcome.digest == expected(scene)
    assert outcome.bytes_by_source["origin"] == scene.size


def test_the_socket_of_a_dead_agent_costs_nothing(scene: Scene, start_agent: StartAgent) -> None:
    start_agent().kill()
    assert find_agent(scene.settings) is not None
    with Forked(jobs.load, scene.uri, env=scene.env) as loading:
        outcome = loading.result()
    assert outcome.digest == expected(scene)
    assert outcome.bytes_by_source == {"origin": scene.size}


def test_an_agent_is_not_asked_where_the_settings_forbid_it(
    scene: Scene, start_agent: StartAgent
) -> None:
    start_agent()
    with Forked(jobs.load, scene.uri, env=scene.env | {"WEIGHTSTREAM_AGENT": "off"}) as loading:
        assert loading.result().bytes_by_source == {"origin": scene.size}


def test_an_agent_whose_origin_dies_is_no_worse_than_none(
    scene: Scene, start_agent: StartAgent
) -> None:
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=3), f.Drop(reset=True))
    start_agent()
    with Forked(jobs.load, scene.uri, env=scene.env) as loading:
        assert loading.result().digest == expected(scene)


def test_sigterm_in_mid_load_ends_it_soon_and_the_load_goes_on(
    scene: Scene, start_agent: StartAgent
) -> None:
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(2 * MIB))
    agent = start_agent()
    run = scene.settings.run_directory
    with Forked(jobs.load, scene.uri, env=scene.env) as loading:
        loading.wait_for(lambda: scene.proxy.body_bytes(".safetensors") > 2 * MIB)
        began_s = time.monotonic()
        assert agent.terminate() == 0
        assert time.monotonic() - began_s < 5
        assert not any((run / name).exists() for name in ("agent.sock", "agent-control.sock"))
        assert loading.result().digest == expected(scene)
