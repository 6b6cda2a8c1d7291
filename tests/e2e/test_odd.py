"""Odd places and odd servers: names, many files, slow heads, full and vanished disks, few files."""

import shutil
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from tests.conftest import LogWatch
from tests.e2e.conftest import Scene, check_message
from tests.kit import faults as f
from tests.kit import jobs, models
from tests.kit.disks import small_disk
from tests.kit.processes import run_python
from tests.kit.s3 import storage_options

import weightstream
from weightstream.errors import ThrottledError, UnavailableError

MIB = 1 << 20


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "plus+sign",
        "100%",
        "%41",
        "ümlaut-模型",
        "a&b=c;d,e",
        "tilde~(1)!'*",
        "at@v1:2",
    ],
)
def test_names_that_need_quoting(scene: Scene, name: str) -> None:
    files = models.sharded(2, 1 * MIB, seed=name)
    scene.s3.put_files(f"models/{scene.prefix}/{name}", files)
    options = storage_options(scene.proxy.url)
    uri = f"{scene.uri}/{name}"
    found = weightstream.load(uri, settings=scene.settings, storage_options=options)
    assert models.same(found, models.tensors(files))


@pytest.mark.parametrize("suffix", ["/", "//", "/model.safetensors.index.json"])
def test_the_same_model_under_other_spellings(scene: Scene, suffix: str) -> None:
    options = storage_options(scene.proxy.url)
    uri = scene.uri + suffix
    found = weightstream.load(uri, settings=scene.settings, storage_options=options)
    assert models.same(found, models.tensors(scene.files))


def test_a_prefix_with_more_files_than_one_page_of_a_listing(scene: Scene) -> None:
    """S3 lists at most 1000 keys at once; the weights come last in the alphabet."""
    folder = scene.s3.root / "models" / scene.prefix
    for i in range(1100):
        (folder / f"a-{i:04}.txt").write_bytes(b"x")
    scene.s3.forget()
    assert scene.loads_right()


def test_only_the_wanted_tensors_cross_the_wire(scene: Scene) -> None:
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    name = "layers.1.k.weight"
    right = models.tensors(scene.files)[name]
    found = scene.load(names=[name])
    assert models.same(found, {name: right})
    size = right.numel() * right.element_size()
    header_ranges = 3 * (256 << 10)  # one speculative range for each header that is needed
    assert scene.proxy.body_bytes("-of-") <= size + header_ranges


def test_retry_after_an_hour_is_an_error_now(scene: Scene) -> None:
    scene.proxy.add(
        f.When(key="-of-", ranged=True, times=None),
        f.Status(503, "SlowDown", retry_after_s=3600),
    )
    started = time.monotonic()
    with pytest.raises(ThrottledError) as caught:
        scene.load()
    assert time.monotonic() - started < 4
    check_message(caught.value, scene.prefix)


def test_retry_after_as_a_date(scene: Scene) -> None:
    scene.use(hedge="off")
    when = f.When(key="-of-", ranged=True, nth=3)
    date = formatdate(time.time() + 3, usegmt=True)  # whole seconds: two to three from now
    scene.proxy.add(when, f.Status(429, "TooManyRequests", retry_after_s=date))
    assert scene.loads_right()
    seen = [e for e in scene.proxy.exchanges() if "-of-" in e.path]
    refused = next(e for e in seen if e.status == 429)
    later = [e.started_s for e in seen if e.started_s > refused.ended_s + 0.1]
    assert min(later) - refused.ended_s > 1.0


def test_heads_that_drip_end_at_the_deadline(scene: Scene) -> None:
    """A byte of header now and then is no progress: no stall either, but no hang."""
    scene.use(stall_timeout_s=1.0, deadline_s=2.0)
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.DripHead(4))
    started = time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        scene.load()
    assert time.monotonic() - started < 12
    check_message(caught.value, scene.prefix, scene.proxy.host)


def test_a_head_request_that_stalls_costs_the_checksum_not_the_load(scene: Scene) -> None:
    scene.proxy.add(f.When(method="HEAD", key="-of-", times=None), f.Stall(60))
    started = time.monotonic()
    assert scene.loads_right()
    assert time.monotonic() - started < 12


def test_a_disk_that_is_full_from_the_start(
    scene: Scene, tmp_path: Path, expect_log: LogWatch
) -> None:
    expect_log("without the store")
    with small_disk(tmp_path / "disk", 8 * MIB) as disk:
        disk.fill()
        scene.use(store=disk.path / "store")
        assert scene.loads_right()
        assert scene.loads_right()
        scene.drain()
    assert len(expect_log.messages("without the store")) == 1


def test_a_store_that_is_deleted_under_a_running_process(
    scene: Scene, expect_log: LogWatch
) -> None:
    expect_log.allow("")
    assert scene.loads_right()
    scene.drain()
    shutil.rmtree(scene.store)
    assert scene.loads_right()
    scene.drain()
    assert scene.loads_right()


def test_few_file_descriptors(scene: Scene) -> None:
    """A limit of 48 open files: fewer connections or an error in words; never a hang."""
    code = """
import resource
from tests.kit.jobs import digest
from weightstream import load
from weightstream.errors import WeightstreamError
import torch
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
try:
    emit(digest(load(sys.argv[1])))
except WeightstreamError as error:
    emit(str(error))
"""
    scene.put(models.sharded(3, 48 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.Latency(0.1))
    outcome = run_python(code, scene.uri, env=scene.env, timeout_s=40)
    right = jobs.digest(models.tensors(scene.files))
    assert outcome.value == right or "open files" in outcome.value, outcome.value
