"""An object replaced while it is loaded: the new version whole, or an error; never a mixture."""

import pytest
from tests.e2e.conftest import Scene, check_message
from tests.kit import faults as f
from tests.kit import jobs, models
from tests.kit.forked import ChildFailed, Forked
from tests.kit.s3 import storage_options
from tests.kit.wire import Request

from weightstream import stream
from weightstream.errors import ObjectChangedError

MIB = 1 << 20


def replace_at(scene: Scene, nth: int, seed: str, times: int | None = 1) -> None:
    """Publish another version just before the nth range of weights is served."""
    versions = iter(range(100))

    def publish(_: Request) -> None:
        scene.put(models.sharded(3, 6 * MIB, seed=f"{seed}-{next(versions)}"))

    when = f.When(key=".safetensors", method="GET", ranged=True, nth=nth, times=times)
    scene.proxy.add(when, f.Hook(publish))


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_replaced_once_loads_the_new_version(scene: Scene, nth: int) -> None:
    scene.use(concurrency=2)
    replace_at(scene, nth, "new")
    assert scene.loads_right()  # compares with the files that are there now
    refused = [e for e in scene.proxy.exchanges() if e.status == 412]
    assert refused


def test_the_store_keeps_only_whole_versions(scene: Scene) -> None:
    scene.use(concurrency=2)
    replace_at(scene, 4, "new")
    assert scene.loads_right()
    scene.drain()
    scene.proxy.clear()
    assert scene.loads_right()
    assert scene.proxy.body_bytes(".safetensors") == 0


def test_replaced_again_and_again_is_an_error(scene: Scene) -> None:
    scene.use(concurrency=2)
    replace_at(scene, 2, "newer", times=None)
    with pytest.raises(ObjectChangedError) as caught:
        scene.load()
    check_message(caught.value, scene.prefix, ".safetensors")


def test_a_stream_that_has_begun_does_not_mix_versions(scene: Scene) -> None:
    scene.use(concurrency=1, range_size=1 * MIB)
    options = storage_options(scene.proxy.url)
    with stream(scene.uri, settings=scene.settings, storage_options=options) as tensors:
        next(tensors)
        scene.put(models.sharded(3, 6 * MIB, seed="later"))
        with pytest.raises(ObjectChangedError):
            list(tensors)


def test_deleted_in_mid_load(scene: Scene) -> None:
    scene.use(concurrency=1)
    name = f"models/{scene.prefix}/model-00003-of-00003.safetensors"
    when = f.When(key=".safetensors", method="GET", ranged=True, nth=2)
    scene.proxy.add(when, f.Hook(lambda _: scene.s3.delete(name)))
    with Forked(jobs.load, scene.uri, env=scene.env) as child, pytest.raises(ChildFailed) as caught:
        child.result()
    check_message(caught.value, scene.prefix)
    assert str(caught.value).startswith(("NotFoundError", "FormatError"))
