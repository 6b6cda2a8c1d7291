"""Kill -9 at any moment: the next process goes on with what is valid, and its bytes are right."""

import random
import time
from pathlib import Path

import pytest
from tests.e2e.conftest import Scene
from tests.kit import faults as f
from tests.kit import jobs, models
from tests.kit.forked import Forked

from weightstream.cachefs.store import ChunkState, Store

MIB = 1 << 20


def durable(scene: Scene) -> set[tuple[str, int]]:
    """What the store has acknowledged as DURABLE."""
    store = Store.open(scene.settings)
    found = set()
    try:
        for info in list(store.blobs()):
            stored = store.find_blob(info.blob)
            if stored is not None:
                states = stored.states()
                kept = (i for i, state in enumerate(states) if state == ChunkState.DURABLE)
                found |= {(info.blob.uri, i) for i in kept}
                stored.close()
    finally:
        store.close()
    return found


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_still_gets_there(scene: Scene, seed: int) -> None:
    rng = random.Random(seed)
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key=".safetensors", ranged=True, times=None), f.Drip(15 * MIB))
    acknowledged: set[tuple[str, int]] = set()
    for _ in range(4):
        before = scene.proxy.body_bytes(".safetensors")
        limit = before + rng.randrange(1, 8 * MIB)
        with Forked(jobs.load, scene.uri, env=scene.env) as child:
            child.wait_for(lambda: scene.proxy.body_bytes(".safetensors") >= limit)  # noqa: B023
            time.sleep(rng.random() * 0.05)
            child.kill()
        now = durable(scene)
        assert acknowledged <= now
        acknowledged = now
    scene.proxy.clear()
    with Forked(jobs.load, scene.uri, env=scene.env) as child:
        outcome = child.result()
    assert outcome.digest == jobs.digest(models.tensors(scene.files))
    with Forked(jobs.load, scene.uri, env=scene.env) as child:
        outcome = child.result()
    assert outcome.digest == jobs.digest(models.tensors(scene.files))
    assert set(outcome.bytes_by_source) == {"mapped"}


def test_killed_in_the_middle_of_write_back(scene: Scene) -> None:
    """The load has all its bytes, the store has some: what is there is used."""
    scene.put(models.sharded(3, 48 * MIB, seed=scene.prefix))
    with Forked(jobs.load, scene.uri, env=scene.env) as child:
        child.wait_for(lambda: _blocks(scene.store) > 4 * MIB)
        child.kill()
    scene.proxy.clear()
    with Forked(jobs.load, scene.uri, env=scene.env) as child:
        outcome = child.result()
    assert outcome.digest == jobs.digest(models.tensors(scene.files))


def _blocks(store: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in store.glob("blobs/*/*.data"))
