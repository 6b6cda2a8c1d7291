"""Where the plug-in cannot be installed it says why, once, and Ray's own scheduler stays."""

import logging
from collections.abc import Iterator

import pytest
import ray
from ray.serve._private import constants, default_impl, deployment_scheduler, deployment_state

from weightstream.errors import ClusterError
from weightstream.serve_integration.compaction import plugin, scheduler
from weightstream.serve_integration.compaction.drain import Drainer
from weightstream.serve_integration.compaction.ledger import Lease
from weightstream.serve_integration.compaction.survey import survey

PACK = "RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY"


@pytest.fixture
def said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(constants, PACK, True)
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    before = (
        default_impl.create_deployment_scheduler,
        deployment_state.RAY_SERVE_NODE_COMPACTION_DELAY_S,
    )
    yield caplog
    logger.removeHandler(caplog.handler)
    (
        default_impl.create_deployment_scheduler,
        deployment_state.RAY_SERVE_NODE_COMPACTION_DELAY_S,
    ) = before


def test_this_ray_has_all_that_it_needs(said: pytest.LogCaptureFixture) -> None:
    assert plugin.why_not() == ""


def stays_as_it_is(said: pytest.LogCaptureFixture, why: str) -> None:
    before = default_impl.create_deployment_scheduler
    plugin.install()
    assert default_impl.create_deployment_scheduler is before
    (message,) = [one.getMessage() for one in said.records]
    assert message == f"weightstream: compaction is not installed: {why}"


def test_an_older_ray(said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.59.1")
    stays_as_it_is(said, "it needs Ray 2.60 or newer, this is 2.59.1")
    with pytest.raises(ClusterError, match=r"it needs Ray 2\.60 or newer"):
        survey()
    with pytest.raises(ClusterError, match=r"it needs Ray 2\.60 or newer"):
        Drainer(Lease("me"))


def test_a_ray_without_a_method_that_is_overridden(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(deployment_scheduler.DeploymentScheduler, "_fail_compaction")
    stays_as_it_is(said, f"Ray {ray.__version__} has no _fail_compaction any more")


def test_a_head_node_without_the_other_variable(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, PACK, False)
    stays_as_it_is(said, f"{PACK}=1 is not set for the controller")


def test_a_scheduler_that_cannot_be_built_leaves_rays_own(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And Ray's own delay, which the plug-in had put out of force."""
    rays = object()
    monkeypatch.setattr(scheduler, "CompactingScheduler", None)
    monkeypatch.setattr(default_impl, "create_deployment_scheduler", lambda *_: rays)
    monkeypatch.setattr(deployment_state, "RAY_SERVE_NODE_COMPACTION_DELAY_S", 7.0)
    plugin.install()
    assert deployment_state.RAY_SERVE_NODE_COMPACTION_DELAY_S == 0.0
    assert default_impl.create_deployment_scheduler(object(), "head") is rays
    assert deployment_state.RAY_SERVE_NODE_COMPACTION_DELAY_S == 7.0
    assert "Ray's own scheduler stays" in said.text
