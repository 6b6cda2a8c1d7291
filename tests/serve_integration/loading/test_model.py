"""`load_model` and `Reloadable` without Ray: what they return, refuse, keep and give back."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Coroutine, Iterator
from pathlib import Path

import pytest
import torch
from examples.shift import Shift, weights
from safetensors.torch import save_file
from tests.conftest import LogWatch, SettingsFactory
from tests.kit import faults as f
from tests.kit.models import plain
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server

from weightstream.errors import LoadCancelled, UsageError, WeightstreamError
from weightstream.serve_integration import Reloadable, aload_model, load_model, prefetch
from weightstream.serve_integration.loading import prefetching
from weightstream.settings import Settings


class Tied(torch.nn.Module):
    """Two names, one parameter; a buffer that no file has; a part that stays in its own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight
        self.ids = torch.nn.Buffer(torch.zeros(3, dtype=torch.int64))
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.full((1,), 0.5), persistent=False)


@pytest.fixture
def settings(store_settings: SettingsFactory) -> Settings:
    return store_settings()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for key in (1, 2, 3):
        (tmp_path / str(key)).mkdir()
        save_file(weights(key), tmp_path / str(key) / "model.safetensors")
    (tmp_path / "tied").mkdir()
    tied = {"embed.weight": torch.randn(8, 4), "ids": torch.arange(3)}
    save_file(tied, tmp_path / "tied" / "model.safetensors")
    return tmp_path


@pytest.fixture(autouse=True)
def _nothing_is_left_pending() -> Iterator[None]:
    yield
    assert prefetching._pending == []


def test_the_module_is_ready_to_answer(folder: Path, settings: Settings) -> None:
    model = load_model(Shift, folder / "1", settings=settings)
    assert model.text("abc") == "bcd"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.letters.tolist() == list(range(97, 123))


def test_dtype_casts_what_is_loaded_and_floating(folder: Path, settings: Settings) -> None:
    model = load_model(Tied, folder / "tied", dtype="bfloat16", device="cpu", settings=settings)
    assert model.embed.weight.dtype is torch.bfloat16
    assert model.ids.dtype is torch.int64
    assert model.ids.tolist() == [0, 1, 2]
    assert model.scale.tolist() == [0.5]


def test_what_is_tied_stays_tied(folder: Path, settings: Settings) -> None:
    model = load_model(Tied, folder / "tied", settings=settings, strict=False)
    assert model.head.weight is model.embed.weight


def test_a_dtype_of_the_prefetch_holds_unless_the_load_names_one(
    folder: Path, settings: Settings
) -> None:
    prefetch(folder / "1", dtype="float16", settings=settings)
    assert load_model(Shift, folder / "1", settings=settings).rows.weight.dtype is torch.float16
    prefetch(folder / "1", dtype="float16", settings=settings)
    model = load_model(Shift, folder / "1", dtype=torch.float32, settings=settings)
    assert model.rows.weight.dtype is torch.float32


@pytest.mark.parametrize("device", ["cuda", 0, "cuda:0"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(
    folder: Path, settings: Settings, device: str | int
) -> None:
    with pytest.raises(UsageError, match=r"finds no CUDA"):
        load_model(Shift, folder / "1", device=device, settings=settings)


def test_wishes_that_cannot_be_are_refused(folder: Path, settings: Settings) -> None:
    with pytest.raises(UsageError, match="float17"):
        load_model(Shift, folder / "1", dtype="float17", settings=settings)
    with pytest.raises(UsageError, match=r"no torch\.nn\.Module"):
        load_model(lambda: 3, folder / "1", settings=settings)  # type: ignore[type-var]
    with pytest.raises(UsageError, match=r"rows\.weight"):
        load_model(Tied, folder / "1", settings=settings)
    with pytest.raises(UsageError, match=r"not in it.*embed\.weight"):
        load_model(Tied, folder / "1", settings=settings, strict=False)


def test_a_prefetch_is_joined_and_its_handle_keeps_no_memory(
    folder: Path, settings: Settings
) -> None:
    handle = prefetch(folder / "1", settings=settings)
    assert prefetch(f"{folder}/1/", settings=settings) is handle
    handle.wait(60)
    assert handle.done
    model = load_model(Shift, folder / "1", settings=settings)
    assert model.text("abc") == "bcd"
    assert handle._fetched is None
    assert prefetch(folder / "1", settings=settings) is not handle
    load_model(Shift, folder / "1", settings=settings)


def test_a_prefetch_that_was_cancelled_gives_its_memory_back(
    folder: Path, settings: Settings
) -> None:
    handle = prefetch(folder / "1", settings=settings)
    handle.wait(60)
    handle.cancel()
    handle.cancel()
    assert handle._fetched is None
    with pytest.raises(LoadCancelled):
        handle.take()


def test_what_went_wrong_with_a_prefetch_is_raised_by_the_load(
    folder: Path, settings: Settings
) -> None:
    prefetch(folder / "none", settings=settings)
    with pytest.raises(WeightstreamError, match="none"):
        load_model(Shift, folder / "none", settings=settings)


def test_a_build_that_fails_ends_the_fetch(folder: Path, settings: Settings) -> None:
    def build() -> Shift:
        raise ZeroDivisionError("my own")

    with pytest.raises(ZeroDivisionError, match="my own"):
        load_model(build, folder / "1", settings=settings)


def test_the_event_loop_goes_on_meanwhile(
    s3: S3Server, proxy: FaultProxy, s3_env: dict[str, str], store_settings: SettingsFactory
) -> None:
    s3.put_files("models/async", plain(1 << 20, 1))
    proxy.add(f.When("async/", "GET", ranged=True), f.Stall(0.5))
    settings = store_settings()

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            one = torch.nn.Module()
            one.weight = torch.nn.Parameter(torch.empty(1 << 18))
            self.layer = torch.nn.ModuleList([one])

    async def main() -> tuple[int, torch.nn.Module]:
        ticks = 0
        load = asyncio.create_task(aload_model(Flat, "s3://models/async", settings=settings))
        while not load.done():
            ticks += 1
            await asyncio.sleep(0.01)
        return ticks, await load

    ticks, model = asyncio.run(main())
    assert ticks >= 20  # of the 50 that fit into the origin's silence alone
    assert sum(parameter.numel() for parameter in model.parameters()) == 1 << 18


def test_cancelling_the_task_ends_the_load(
    s3: S3Server, proxy: FaultProxy, s3_env: dict[str, str], store_settings: SettingsFactory
) -> None:
    s3.put_files("models/silent", plain(1 << 20, 1))
    asked = threading.Event()
    silence = f.When("silent/model", "GET", times=None)
    proxy.add(silence, f.Hook(lambda _: asked.set()), f.Stall(60.0))
    settings = store_settings(stall_timeout_s=60.0, deadline_s=120.0)

    async def main() -> None:
        load = asyncio.create_task(aload_model(Shift, "s3://models/silent", settings=settings))
        assert await asyncio.to_thread(asked.wait, 60)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(load, 20)

    asyncio.run(main())


class Reloading(Reloadable[Shift]):
    """With models of a folder."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(Shift, settings=settings)
        self.folder = folder

    def key(self) -> str:
        return self.module.text("a")


def test_another_version_takes_over_and_the_old_one_is_let_go(
    folder: Path, settings: Settings
) -> None:
    model = Reloading(folder, settings)
    with pytest.raises(UsageError, match="nothing is loaded"):
        model(torch.tensor([97]))
    model.reload(folder / "1")
    first = model.module
    rows = weakref.ref(first.rows.weight)
    assert model.key() == "b"
    model.reload(folder / "1")
    assert model.module is first
    model.reload(folder / "2")
    assert model.key() == "c"
    assert first.text("a") == "b"  # for a request that still has it
    assert model.uri == str(folder / "2")
    del first
    gc.collect()
    assert rows() is None


@pytest.mark.parametrize("way", ["reload", "areload", "follow"])
def test_a_reload_that_fails_changes_nothing_and_says_so(
    folder: Path, settings: Settings, way: str, expect_log: LogWatch
) -> None:
    expect_log(r"none is not loaded, .*/1 goes on answering: .*none")
    model = Reloading(folder, settings)
    model.reload(folder / "1")
    if way == "follow":
        asyncio.run(model.follow(folder / "none"))
        join_threads("weightstream-reload")
    else:
        with pytest.raises(WeightstreamError, match="none"):
            run(getattr(model, way)(folder / "none"))
    join_threads("weightstream-report")
    assert model.key() == "b"
    assert model.uri == str(folder / "1")
    assert model.failure is not None
    assert "none" in model.failure
    run(getattr(model, way)(folder / "2"))
    join_threads("weightstream-reload")
    assert model.key() == "c"
    assert model.failure is None


def run(work: Coroutine[object, object, None] | None) -> None:
    if work is not None:
        asyncio.run(work)


def join_threads(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(20)


def test_the_first_load_fails_loudly(folder: Path, settings: Settings) -> None:
    model = Reloading(folder, settings)
    with pytest.raises(WeightstreamError, match="none"):
        asyncio.run(model.follow(folder / "none"))
    assert model.uri is None
    assert model.failure is not None
    asyncio.run(model.follow(folder / "1"))
    assert model.key() == "b"


def test_what_was_asked_for_last_holds(
    s3: S3Server, proxy: FaultProxy, s3_env: dict[str, str], store_settings: SettingsFactory
) -> None:
    """The first is slower than the second, and comes too late to be shown."""
    from safetensors.torch import save

    for key in (1, 2):
        s3.put(f"models/turns/{key}/model.safetensors", save(weights(key)))
    asked, go_on = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        asked.set()
        assert go_on.wait(60)

    proxy.add(f.When("turns/1/model", "GET", ranged=True), f.Hook(hold))
    model = Reloadable(Shift, settings=store_settings())

    async def main() -> None:
        slow = asyncio.create_task(model.areload("s3://models/turns/1"))
        assert await asyncio.to_thread(asked.wait, 60)
        await model.areload("s3://models/turns/2")
        go_on.set()
        await slow

    asyncio.run(main())
    assert model.uri == "s3://models/turns/2"
    assert model.module.text("a") == "c"
