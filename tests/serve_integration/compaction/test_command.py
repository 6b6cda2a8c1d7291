"""The command, where the plug-in runs in the controller."""

from collections.abc import Mapping

import pytest
from tests.kit.ray_cluster import RayCluster, Traffic, wait_until
from tests.serve_integration.compaction.command import compact, dry_run, watching
from tests.serve_integration.compaction.scene import GO, at_rest, layout, state

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import ledger, tuning

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_a_dry_run_explains_and_moves_nothing(cluster: RayCluster, apps: Mapping[str, str]) -> None:
    report = dry_run(cluster)
    assert (report["nodes_now"], report["nodes_then"]) == (3, 2)
    assert (report["cost_now"], report["cost_then"]) == (6, 4)
    assert (report["why_drain"], report["unrest"]) == ("", "")
    assert report["state"]["phase"] == "waiting"
    (move,) = report["moves"]
    assert move["node_id"] in apps.values()
    assert move["load_bytes"] == 1 << 20, "no agent holds anything"
    outcomes = {one["node_id"]: one["outcome"] for one in report["kept"]}
    assert outcomes.pop(cluster.head.id) == "head"
    assert list(outcomes.values()) == ["no room", "no room"]
    shown = compact(cluster).stdout
    assert "3 worker nodes in use, 2 would do: 33 % of their cost saved" in shown
    assert "Serve's controller compacts" in shown
    assert layout(cluster) == apps


def test_what_is_tuned_holds_for_the_dry_run_and_for_the_controller(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    assert compact(cluster, "--tune", "keep_nodes=3").returncode == 0
    report = dry_run(cluster)
    assert report["moves"] == []
    assert {one["outcome"] for one in report["kept"]} == {"head", "fewest kept"}
    refused = compact(cluster, "--tune", "keep_node=3")
    assert refused.returncode == 2
    assert "nothing is called 'keep_node'" in refused.stderr
    assert tuning.read().keep_nodes == 3
    done = compact(cluster, "--now")
    assert (done.returncode, layout(cluster)) == (0, apps), done.stderr


def test_now_skips_the_waits_and_ends_when_nothing_is_left_to_do(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    compact(cluster, "--tune", "release_s=1")
    with Traffic(cluster.url("/a"), per_s=20) as traffic:
        done = compact(cluster, "--now")
        assert done.returncode == 0, done.stderr
        assert len(set(layout(cluster).values())) == 2
        assert at_rest(cluster)
    assert traffic.failures() == []
    assert "nodes emptied: 1; no node can be emptied" in done.stdout
    assert not ledger.is_hurried()


def test_now_gives_up_where_replacements_do_not_start(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    registry.note("test/fail", True)
    done = compact(cluster, "--now")
    registry.note("test/fail", None)
    assert done.returncode == 8
    assert "the replicas stay: 2 replacements ended before they ran" in done.stdout
    wait_until(lambda: at_rest(cluster), "nothing is left over")
    assert layout(cluster) == apps
    assert state().failures == 1, "it does not try again"


def test_watch_leaves_the_work_to_the_controller(
    cluster: RayCluster, apps: Mapping[str, str]
) -> None:
    with watching(cluster) as said:
        tuning.write(GO)
        wait_until(lambda: "settled: no node can be emptied\n" in said, "it says so", 120)
        assert ledger.lease_holder() == ""
        assert len(set(layout(cluster).values())) == 2
