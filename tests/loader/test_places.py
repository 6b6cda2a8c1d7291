"""Where a load may happen: local paths, mounts, forks, event loops, odd stores."""

import asyncio
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import LogWatch, SettingsFactory
from tests.kit import models
from tests.kit.faults import ALWAYS, Drip
from tests.kit.processes import run_python, start_python
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import client_env
from tests.loader.conftest import Model, ModelFactory

import weightstream
from weightstream.cachefs.fetch import process_engine
from weightstream.errors import (
    ForeignStoreError,
    FormatError,
    NotFoundError,
    ObjectChangedError,
    UsageError,
)
from weightstream.loader import aload, load, load_with_report, stream
from weightstream.loader.session import canonical_uri

MIB = 1 << 20


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def get(model: Model, **given: object) -> dict[str, torch.Tensor]:
    return load(model.uri, settings=model.settings, storage_options=model.options, **given)  # type: ignore[arg-type]


# Local files


@pytest.mark.parametrize("files", [models.tiny(), models.sharded(3, MIB)], ids=["one", "sharded"])
def test_local_models_are_mapped_by_any_kind_of_path(
    tmp_path: Path,
    files: dict[str, bytes],
    store_settings: SettingsFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write(tmp_path / "a model", files)
    monkeypatch.chdir(tmp_path)
    expected = models.tensors(files)
    for uri in (folder, str(folder), f"file://{folder}", f"{folder}/", "a model", "./a model"):
        found = load_with_report(uri, settings=store_settings())
        assert models.same(found.tensors, expected)
        assert set(found.report.bytes_by_source) == {"mapped"}
    assert models.same(dict(stream(folder)), expected)
    assert not (tmp_path / "store").exists(), "local files need no second copy"


def test_one_local_file_and_its_index(tmp_path: Path) -> None:
    files = models.sharded(2, MIB)
    folder = write(tmp_path / "m", files)
    one = "model-00001-of-00002.safetensors"
    assert models.same(load(folder / one), models.tensors({one: files[one]}))
    index = folder / "model.safetensors.index.json"
    assert models.same(load(index), models.tensors(files))


def test_local_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        load(tmp_path / "nobody")
    with pytest.raises(NotFoundError):
        load(write(tmp_path / "empty", {"config.json": b"{}"}))
    with pytest.raises(FormatError, match="too few"):
        load(write(tmp_path / "zero", {"model.safetensors": b""}))
    for wrong in ("", "a\0b"):
        with pytest.raises(UsageError, match="URI or a path"):
            load(wrong)


def test_a_local_file_that_shrank_is_not_mapped(tmp_path: Path) -> None:
    from weightstream.cachefs.blob import Blob
    from weightstream.loader.mapped import map_file

    path = write(tmp_path / "m", models.tiny()) / "model.safetensors"
    with pytest.raises(ObjectChangedError, match="when listed"):
        map_file(path, Blob(f"file://{path}", path.stat().st_size + 1, "v"))


def test_a_path_inside_a_mount_is_read_through_the_store(
    put: ModelFactory, proxy: FaultProxy, tmp_path: Path
) -> None:
    model = put(models.tiny())
    shown = write(tmp_path / "mnt", {"model": b""})
    try:
        os.setxattr(shown, "user.weightstream.uri", model.uri.encode())
    except OSError as error:
        pytest.skip(f"no extended attributes here: {error}")
    assert canonical_uri(shown) == model.uri
    found = load(shown, settings=model.settings, storage_options=model.options)
    assert models.same(found, model.tensors)
    assert proxy.body_bytes(model.key) > 0


def test_secrets_of_a_signed_url_are_for_the_origin_alone() -> None:
    signed = "https://user:pass@host/m/model.safetensors?X-Amz-Signature=topsecret"
    assert canonical_uri(signed) == "https://host/m/model.safetensors"
    azure = "abfs://container@account.dfs.core.windows.net/m"
    assert canonical_uri(azure) == azure


# Processes and event loops


def test_a_forked_child_may_load_again(put: ModelFactory) -> None:
    model = put(models.plain(3 * MIB))
    code = """
import os, torch, weightstream
from weightstream.settings import load_settings
settings = load_settings({"store": sys.argv[2], "store_min_free_bytes": 0})
names = ["layer.0.weight"]
first = weightstream.load(sys.argv[1], settings=settings, names=names)
torch.set_num_threads(1)
pid = os.fork()
if pid == 0:
    again = weightstream.load(sys.argv[1], settings=settings)
    same = torch.equal(*(t["layer.0.weight"].view(torch.uint8) for t in (again, first)))
    os._exit(0 if same and len(again) == 8 else 1)
emit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
emit(len(weightstream.load(sys.argv[1], settings=settings)))
"""
    env = client_env(str(model.options["endpoint_url"]))
    outcome = run_python(code, model.uri, model.settings.store, env=env)
    assert outcome.values == (0, 8), outcome.stderr


@pytest.mark.slow
def test_a_child_forked_in_mid_stream_ends_although_it_inherits_the_stream(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.plain(8 * MIB, tensors=8))
    proxy.add(replace(ALWAYS, key=".safetensors", nth=2), Drip(1e6))
    code = """
import os, torch, weightstream
from weightstream.settings import load_settings
settings = load_settings({"store": sys.argv[2], "chunk_size": 1 << 20})
tensors = weightstream.stream(sys.argv[1], settings=settings)
next(tensors)
pid = os.fork()
if pid == 0:
    del tensors
    sys.exit(7)
emit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
tensors.close()
"""
    outcome = run_python(code, model.uri, model.settings.store, env=client_env(proxy.url))
    assert outcome.value == 7, outcome.stderr
    assert outcome.wall_s < 20


def test_a_stream_collected_on_a_fetching_thread_does_not_wait_for_itself(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.plain(4 * MIB, tensors=4), write_back="off")
    proxy.add(replace(ALWAYS, key=".safetensors", nth=2), Drip(1e6))
    tensors = stream(model.uri, settings=model.settings, storage_options=model.options)
    next(tensors)
    holder = [tensors]
    del tensors
    thread = threading.Thread(target=holder.clear, name="weightstream-fetch")
    thread.start()
    thread.join(1)
    assert not thread.is_alive()
    deadline = time.monotonic() + 5
    while process_engine(model.settings).budget.used_bytes:
        process_engine(model.settings).slabs.trim()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_that_start_together_fetch_one_copy(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.sharded(2, 24 * MIB))
    code = """
import torch, weightstream
from weightstream.settings import load_settings
settings = load_settings({"store": sys.argv[2], "store_min_free_bytes": 0, "chunk_size": 1 << 20})
tensors = weightstream.load(sys.argv[1], settings=settings)
emit(sum(int(t.view(torch.uint8).sum()) for t in tensors.values()))
"""
    env = client_env(proxy.url)
    given = (model.uri, model.settings.store)
    with start_python(code, *given, env=env) as one, start_python(code, *given, env=env) as two:
        values = {one.result().value, two.result().value}
    assert values == {sum(int(t.view(torch.uint8).sum()) for t in model.tensors.values())}
    assert proxy.body_bytes("model-") <= 1.05 * model.weight_bytes


def test_aload_leaves_the_loop_free(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.plain(MIB))
    proxy.add(replace(ALWAYS, key=".safetensors"), Drip(2e6))

    async def main() -> tuple[dict[str, torch.Tensor], int]:
        ticks = 0
        task = asyncio.create_task(
            aload(model.uri, settings=model.settings, storage_options=model.options)
        )
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await task, ticks

    found, ticks = asyncio.run(main())
    assert models.same(found, model.tensors)
    assert ticks > 10


def wait_for_bytes(proxy: FaultProxy) -> None:
    deadline = time.monotonic() + 10
    while not proxy.body_bytes(".safetensors") and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_cancelled_aload_ends_its_flow(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.plain(8 * MIB))
    proxy.add(replace(ALWAYS, key=".safetensors"), Drip(2e5))

    async def main() -> float:
        task = asyncio.create_task(
            aload(model.uri, settings=model.settings, storage_options=model.options)
        )
        await asyncio.to_thread(wait_for_bytes, proxy)
        begun_s = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - begun_s

    assert asyncio.run(main()) < 3
    sent = proxy.body_bytes(".safetensors")
    time.sleep(0.5)
    assert proxy.body_bytes(".safetensors") - sent < 256 << 10


def test_errors_come_out_of_aload(put: ModelFactory) -> None:
    model = put({"model.safetensors": b"junk-junk-junk"})
    with pytest.raises(FormatError):
        asyncio.run(aload(model.uri, settings=model.settings, storage_options=model.options))


def test_the_public_names_are_these() -> None:
    for name in ("load", "stream", "load_into", "open", "aload"):
        assert callable(getattr(weightstream, name))


# Odd stores


def test_stored_bytes_that_were_damaged_are_fetched_again(
    put: ModelFactory, proxy: FaultProxy, expect_log: LogWatch
) -> None:
    model = put(models.plain(4 * MIB), hedge="off")  # a straggler would cost a chunk more
    get(model)
    model.wait_for_store()
    data = max(model.settings.store.rglob("*"), key=lambda p: p.stat().st_size)
    with data.open("r+b") as file:
        file.seek(2 * MIB + 17)
        file.write(b"\0\1\2\3")
    expect_log("was changed by somebody")
    expect_log("does not match its hash")
    sent = proxy.body_bytes(".safetensors")
    assert models.same(get(model), model.tensors)
    assert proxy.body_bytes(".safetensors") - sent == MIB, "one chunk"


def test_verify_always_finds_damage_behind_an_unchanged_stamp(
    put: ModelFactory, expect_log: LogWatch
) -> None:
    model = put(models.plain(4 * MIB), verify="always")
    get(model)
    model.wait_for_store()
    data = max(model.settings.store.rglob("*"), key=lambda p: p.stat().st_size)
    stat = data.stat()
    with data.open("r+b") as file:
        file.seek(MIB)
        file.write(b"\0\1\2\3")
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    expect_log("does not match its hash")
    assert models.same(get(model), model.tensors)


def test_a_store_that_cannot_be_made_is_said_once_and_done_without(
    put: ModelFactory, expect_log: LogWatch
) -> None:
    model = put(models.tiny(), store=Path("/proc/store"))
    expect_log("loading without the store")
    for _ in range(2):
        assert models.same(get(model), model.tensors)
    assert len(expect_log.messages("loading without the store")) == 1


def test_somebody_elses_directory_is_refused(put: ModelFactory, tmp_path: Path) -> None:
    foreign = write(tmp_path / "foreign", {"precious.txt": b"do not touch"})
    model = put(models.tiny(), store=foreign)
    with pytest.raises(ForeignStoreError, match="foreign"):
        get(model)
    assert [p.name for p in foreign.iterdir()] == ["precious.txt"]
