"""An agent in a process of its own, in front of a model on a real S3 server."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import SettingsFactory
from tests.e2e.conftest import Scene, scene
from tests.kit.agents import AgentProcess

__all__ = ["AgentProcess", "scene"]


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def store_settings(store_settings: SettingsFactory, run_directory: Path) -> SettingsFactory:
    """Settings of a node that may have an agent."""
    return lambda **overrides: store_settings(**{"run_directory": run_directory, **overrides})


@pytest.fixture
def start_agent(scene: Scene) -> Iterator[Callable[..., AgentProcess]]:
    """Start the agent of the scene's node."""
    started: list[AgentProcess] = []

    def start(*arguments: str) -> AgentProcess:
        agent = AgentProcess(scene.env, *arguments)
        started.append(agent)
        return agent.wait_ready()

    yield start
    for one in started:
        one.__exit__()


def eventually(happened: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until something is so."""
    until_s = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until_s, "did not happen"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory of an agent that the tests of a module share."""
    home = tmp_path_factory.mktemp("node")
    run = home / "run"
    run.mkdir(mode=0o700)
    env = {"WEIGHTSTREAM_STORE": str(home / "store"), "WEIGHTSTREAM_RUN_DIRECTORY": str(run)}
    with AgentProcess(env | {"WEIGHTSTREAM_STORE_MIN_FREE_BYTES": "0"}) as agent:
        agent.wait_ready()
        yield run
        assert agent.terminate() == 0
