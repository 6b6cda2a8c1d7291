"""A store that cannot be written, or was damaged behind our back: right bytes all the same."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import LogWatch
from tests.e2e.conftest import Scene, check_message
from tests.kit import faults as f
from tests.kit import jobs, models
from tests.kit.disks import small_disk
from tests.kit.forked import Forked

from weightstream.cachefs.store import Store
from weightstream.errors import ForeignStoreError

MIB = 1 << 20


def data_files(scene: Scene) -> list[Path]:
    """The stored shards, in no order."""
    found = [p for p in scene.store.glob("blobs/*/*.data") if p.stat().st_size > MIB]
    assert len(found) == 3
    return found


def tables(scene: Scene) -> list[Path]:
    return [path.with_suffix(".table") for path in data_files(scene)]


def flip(path: Path, at: int, keep_time: bool = False) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def warm(scene: Scene) -> Scene:
    """The scene with its model complete in the store; nothing asked twice on a slow machine."""
    scene.use(hedge="off")
    assert scene.loads_right()
    scene.drain()
    scene.proxy.clear()
    assert scene.loads_right()
    assert scene.proxy.body_bytes(".safetensors") == 0
    return scene


def test_a_flipped_bit_is_found_and_its_chunk_fetched_again(
    warm: Scene, expect_log: LogWatch
) -> None:
    expect_log("was changed by somebody")
    expect_log("(?i)wrong|damaged|hash|drop")
    flip(data_files(warm)[0], 1_500_000)
    assert warm.loads_right()
    assert 0 < warm.proxy.body_bytes(".safetensors") <= 1 * MIB
    warm.drain()
    warm.proxy.clear()
    assert warm.loads_right()
    assert warm.proxy.body_bytes(".safetensors") == 0


def test_a_bit_flipped_without_a_trace_is_found_when_asked_to(
    warm: Scene, expect_log: LogWatch
) -> None:
    """Same size, same time: only hashing sees it, and only `verify=always` hashes sealed blobs."""
    expect_log("(?i)wrong|damaged|hash|drop")
    flip(data_files(warm)[0], 1_500_000, keep_time=True)
    warm.use(verify="always", hedge="off")
    assert warm.loads_right()
    assert 0 < warm.proxy.body_bytes(".safetensors") <= 1 * MIB


def test_a_flipped_bit_in_a_blob_that_is_not_complete(warm: Scene) -> None:
    """Chunks of an unfinished blob are hashed by each process before it uses them."""
    store = Store.open(warm.settings)
    blob = next(info.blob for info in store.blobs() if "00002-of" in info.blob.uri)
    stored = store.find_blob(blob)
    assert stored is not None
    stored.drop(1)
    path = stored.data_path
    stored.close()
    store.close()
    flip(path, 500_000)
    with Forked(jobs.load, warm.uri, env=warm.env) as other:
        assert other.result().digest == jobs.digest(models.tensors(warm.files))
    assert warm.proxy.body_bytes("00002-of") == 2 * MIB


@pytest.mark.parametrize("size", [0, 1, 4096, 1_234_567])
def test_a_truncated_file_is_refetched_where_it_lacks(
    warm: Scene, expect_log: LogWatch, size: int
) -> None:
    expect_log("was changed by somebody")
    expect_log.allow("")
    os.truncate(data_files(warm)[0], size)
    assert warm.loads_right()
    assert warm.proxy.body_bytes(".safetensors") <= 2.1 * MIB


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
        lambda path: os.truncate(path, 100),
        lambda path: flip(path, 40),
        lambda path: path.unlink(),
    ],
    ids=["empty", "garbage", "truncated", "header flipped", "gone"],
)
def test_a_damaged_table_costs_its_blob_only(
    warm: Scene, expect_log: LogWatch, damage: Callable[[Path], None]
) -> None:
    expect_log.allow("")  # what is said depends on the damage
    damage(tables(warm)[0])
    assert warm.loads_right()
    assert warm.proxy.body_bytes(".safetensors") <= 2.1 * MIB


def test_chunk_entries_flipped_never_give_wrong_bytes(warm: Scene, expect_log: LogWatch) -> None:
    table = tables(warm)[0]
    for at in range(64, table.stat().st_size, 97):
        flip(table, at)
    expect_log.allow("")
    assert warm.loads_right()


def test_a_data_file_that_vanished(warm: Scene, expect_log: LogWatch) -> None:
    expect_log.allow("")
    data_files(warm)[0].unlink()
    assert warm.loads_right()
    assert warm.proxy.body_bytes(".safetensors") <= 2.1 * MIB


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_too_small_for_the_model(
    scene: Scene, expect_log: LogWatch, tmp_path: Path, kind: str
) -> None:
    scene.put(models.sharded(3, 48 * MIB, seed=scene.prefix))
    expect_log("going on without the store")
    with small_disk(tmp_path / "disk", 20 * MIB, kind) as disk:
        scene.use(store=disk.path / "store")
        assert scene.loads_right()
        scene.drain()
        assert scene.loads_right()
        scene.drain()
    assert len(expect_log.messages("going on without")) == 1


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_disk_that_fills_up_in_mid_load(
    scene: Scene, expect_log: LogWatch, tmp_path: Path, kind: str
) -> None:
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.use(concurrency=2)
    expect_log("going on without the store")
    with small_disk(tmp_path / "disk", 64 * MIB, kind) as disk:
        scene.use(store=disk.path / "store", concurrency=2)
        when = f.When(key=".safetensors", ranged=True, nth=8)
        scene.proxy.add(when, f.Hook(lambda _: disk.fill()))
        assert scene.loads_right()
        scene.drain()
        (disk.path / "ballast").unlink()
        with Forked(jobs.load, scene.uri, env=scene.env) as other:
            assert other.result().digest == jobs.digest(models.tensors(scene.files))
    assert len(expect_log.messages("going on without")) == 1


def test_a_read_only_store_serves_and_a_cold_one_does_no_harm(
    scene: Scene, tmp_path: Path, expect_log: LogWatch
) -> None:
    with small_disk(tmp_path / "disk", 64 * MIB) as disk:
        scene.use(store=disk.path / "store")
        with Forked(jobs.load, scene.uri, env=scene.env) as cold:
            right = cold.result().digest
        disk.set_read_only(True)
        scene.proxy.clear()
        with Forked(jobs.load, scene.uri, env=scene.env) as warm:
            assert warm.result().digest == right
        assert scene.proxy.body_bytes(".safetensors") == 0
        scene.put(models.sharded(3, 6 * MIB, seed="another"))
        with Forked(jobs.load, scene.uri, env=scene.env | {"WEIGHTSTREAM_FRESH": "true"}) as other:
            assert other.result().digest == jobs.digest(models.tensors(scene.files))


def test_an_empty_directory_that_cannot_be_written(
    scene: Scene, tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log("without the store")
    with small_disk(tmp_path / "disk", 64 * MIB) as disk:
        disk.set_read_only(True)
        scene.use(store=disk.path / "store")
        assert scene.loads_right()
        assert scene.loads_right()
    assert len(expect_log.messages("without the store")) == 1


def test_somebody_elses_directory_is_refused_and_left_alone(scene: Scene, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    scene.use(store=theirs)
    with pytest.raises(ForeignStoreError) as caught:
        scene.load()
    check_message(caught.value, str(theirs))
    assert [path.name for path in theirs.iterdir()] == ["thesis.tex"]
