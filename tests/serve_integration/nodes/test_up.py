"""Agents on a real cluster: they come, stay, are replaced, and go."""

import pytest
from tests.kit.ray_cluster import RayCluster
from tests.serve_integration.nodes.conftest import SETTINGS, daemons, eventually

from weightstream.serve_integration import nodes, registry
from weightstream.serve_integration.nodes.talking import status_of

pytestmark = pytest.mark.ray


def test_up_is_idempotent_and_down_leaves_nothing(cluster: RayCluster) -> None:
    first = nodes.up(["s3://models"], SETTINGS)
    assert {one.way for one in first} == {"started"}, first
    assert {one.node_id for one in first} == {node.id for node in cluster.nodes}
    again = nodes.up(["s3://models"], SETTINGS)
    assert [one.way for one in again] == ["kept"] * 3
    assert [one.agent for one in again] == [one.agent for one in first]
    for agent in registry.agents().values():
        eventually(lambda agent=agent: len(status_of(agent)["peers"]["members"]) == 3)
    assert {one.way for one in nodes.down()} == {"stopped"}
    assert registry.agents() == {}
    assert daemons(cluster.directory) == []
    assert {one.way for one in nodes.down()} == {"none"}
