"""The callback for serve.llm, on Ray's own classes as far as they import without vLLM."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from tests.kit.ray_cluster import NodeSpec, RayCluster

from weightstream.errors import UsageError

pytestmark = pytest.mark.ray
URI = "s3://models/llama"
NAME = "weightstream.serve_integration.llm:MountedModel"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster([NodeSpec(cpus=2), NodeSpec(cpus=2)]) as running:
        yield running


def callback(uri: str = URI, placement_group: Any = None) -> Any:
    """Make one as serve.llm does."""
    from weightstream.serve_integration.llm import MountedModel

    ctx = {"placement_group": placement_group}
    return MountedModel(llm_config=None, raise_error_on_callback=True, ctx_kwargs=ctx, uri=uri)


def test_nothing_is_downloaded_and_the_replica_s_node_prefetches(cluster: RayCluster) -> None:
    group = ray.util.placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_PACK")
    ray.get(group.ready(), timeout=60)
    made = callback(placement_group=group)
    asyncio.run(made.run_callback("on_before_node_init"))
    assert not made.ctx.run_init_node
    assert made.warming.wait(60)
    (node,) = made.warming.progress()
    assert node in {worker.id for worker in cluster.workers}
    assert made.warming.progress()[node].state == "skipped"  # no agents on this cluster
    ray.util.remove_placement_group(group)


def test_a_group_of_several_nodes_prefetches_on_all(cluster: RayCluster) -> None:
    from weightstream.serve_integration.llm import nodes_of

    group = ray.util.placement_group([{"CPU": 2}, {"CPU": 2}], strategy="STRICT_SPREAD")
    ray.get(group.ready(), timeout=60)
    assert nodes_of(group) == sorted(worker.id for worker in cluster.workers)
    ray.util.remove_placement_group(group)


def test_without_a_group_it_is_the_node_itself(cluster: RayCluster) -> None:
    from weightstream.serve_integration.llm import nodes_of

    assert nodes_of(None) == [cluster.head.id]


def test_a_path_is_no_uri(cluster: RayCluster) -> None:
    with pytest.raises(UsageError, match="/mnt/models"):
        callback("/mnt/models/llama")


@pytest.mark.filterwarnings("ignore")  # Ray's own modules use what pydantic deprecates
def test_an_llmconfig_takes_the_documented_configuration() -> None:
    """Ray's configuration classes import with pyarrow; the engine itself needs vLLM."""
    pytest.importorskip("pyarrow", reason="ray.llm's LLMConfig needs pyarrow")
    from ray.llm._internal.common.utils.import_utils import load_class
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    from weightstream.serve_integration.llm import MountedModel

    config = LLMConfig(
        model_loading_config={"model_id": "llama", "model_source": "/mnt/models/llama"},
        placement_group_config={
            "bundle_per_worker": {"CPU": 1, "GPU": 1},
            "strategy": "STRICT_PACK",
        },
        callback_config={"callback_class": NAME, "callback_kwargs": {"uri": URI}},
    )
    assert load_class(config.callback_config.callback_class) is MountedModel
    assert config.placement_group_config["strategy"] == "STRICT_PACK"
    assert config.callback_config.callback_kwargs == {"uri": URI}


@pytest.mark.filterwarnings("ignore")
def test_a_mounted_path_is_no_remote_source() -> None:
    """So serve.llm itself would copy nothing either, were the callback left out."""
    pytest.importorskip("pyarrow", reason="ray.llm's download module needs pyarrow")
    from ray.llm._internal.common.utils.download_utils import download_model_files

    assert download_model_files(model_id="/mnt/models/llama") == "/mnt/models/llama"
