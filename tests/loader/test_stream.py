"""`stream`: order, back-pressure, bounded memory, early ends, restarts. Against a real server."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from tests.kit import models
from tests.kit.faults import ALWAYS, CHANGED, Drip, Status, When
from tests.kit.processes import run_python
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, client_env
from tests.loader.attacks.corpus import entry, file
from tests.loader.conftest import Model, ModelFactory

from weightstream.cachefs.fetch import process_engine
from weightstream.errors import (
    AccessDeniedError,
    FormatError,
    LoadCancelled,
    ObjectChangedError,
    UsageError,
)
from weightstream.loader import TensorStream, stream
from weightstream.loader.stores import process_store
from weightstream.loader.streamed import Order

MIB = 1 << 20


def begin(model: Model, order: Order = "readiness", **given: object) -> TensorStream:
    return stream(
        model.uri,
        order=order,
        settings=model.settings,
        storage_options=model.options,
        **given,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("order", ["readiness", "natural"])
@pytest.mark.parametrize(
    "files",
    [models.tiny(), models.plain(5 * MIB, tensors=30), models.sharded(3, 9 * MIB)],
    ids=["tiny", "plain", "sharded"],
)
def test_cold_and_warm_streams_equal_safetensors(
    put: ModelFactory, proxy: FaultProxy, files: dict[str, bytes], order: Order
) -> None:
    model = put(files)
    cold = list(begin(model, order))
    assert len(cold) == len(model.tensors)
    assert models.same(dict(cold), model.tensors)
    model.wait_for_store()
    sent = proxy.body_bytes(model.key)
    assert models.same(dict(begin(model, order)), model.tensors)
    assert proxy.body_bytes(model.key) == sent, "the second stream was mapped"


def test_natural_order_is_that_of_layers(put: ModelFactory) -> None:
    names = [f"layers.{i}.w" for i in range(12)]
    entries = {n: entry(i * MIB, (i + 1) * MIB, "U8", [MIB]) for i, n in enumerate(sorted(names))}
    data = file(entries, models.random_bytes(12 * MIB, "n"))
    model = put({"model.safetensors": data}, memory_budget=8 * MIB, write_back="off")
    found = list(begin(model, "natural"))
    assert [name for name, _ in found] == names
    assert models.same(dict(found), model.tensors)


def test_natural_order_across_shards_that_interleave(put: ModelFactory) -> None:
    files = {}
    for part in range(2):
        names = [f"layers.{i}.w" for i in range(part, 16, 2)]
        entries = {n: entry(i * MIB, (i + 1) * MIB, "U8", [MIB]) for i, n in enumerate(names)}
        files[f"part-{part}.safetensors"] = file(entries, models.random_bytes(8 * MIB, str(part)))
    model = put(files, memory_budget=4 * MIB, write_back="off")
    found = list(begin(model, "natural"))
    assert [name for name, _ in found] == [f"layers.{i}.w" for i in range(16)]
    assert models.same(dict(found), model.tensors)


def test_a_slow_consumer_holds_the_fetch_back(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.plain(32 * MIB, tensors=32), memory_budget=8 * MIB, write_back="off")
    with begin(model) as tensors:
        name, _ = next(tensors)
        time.sleep(1.0)
        assert proxy.body_bytes(".safetensors") <= 8 * MIB, "half the budget and what runs"
        rest = dict(tensors)
    assert len(rest | {name: None}) == 32


def test_a_tensor_larger_than_the_budget_and_a_consumer_that_keeps_all(put: ModelFactory) -> None:
    entries = {
        "a": entry(0, MIB, "U8", [MIB]),
        "large": entry(MIB, 25 * MIB, "U8", [24 * MIB]),
        "z": entry(25 * MIB, 26 * MIB, "U8", [MIB]),
    }
    files = {"model.safetensors": file(entries, models.random_bytes(26 * MIB, "large"))}
    for order in ("readiness", "natural"):
        model = put(files, memory_budget=4 * MIB)
        assert models.same(dict(begin(model, order)), model.tensors)


def test_two_streams_with_one_tiny_budget_both_end(put: ModelFactory) -> None:
    one = put(models.plain(12 * MIB, tensors=6, seed="1"), memory_budget=4 * MIB)
    two = replace(put(models.plain(12 * MIB, tensors=6, seed="2")), settings=one.settings)
    with begin(one) as first, begin(two) as second:
        pairs = list(zip(first, second, strict=True))
    assert models.same(dict(a for a, _ in pairs), one.tensors)
    assert models.same(dict(b for _, b in pairs), two.tensors)


def test_everything_streamed_is_kept_although_the_consumer_is_slow(put: ModelFactory) -> None:
    model = put(models.plain(16 * MIB, tensors=16), memory_budget=16 * MIB)
    with begin(model) as tensors:
        for _ in tensors:
            time.sleep(0.05)
    model.wait_for_store()
    store = process_store(model.settings)
    assert store is not None
    stored = {info.blob.uri: info for info in store.blobs()}
    assert stored[f"{model.uri}/model.safetensors"].complete


def test_closing_ends_the_fetch(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.plain(16 * MIB, tensors=16), write_back="off")
    proxy.add(replace(ALWAYS, key=".safetensors"), Drip(2e6))
    tensors = begin(model)
    next(tensors)
    tensors.close()
    tensors.close()
    sent = proxy.body_bytes(".safetensors")
    time.sleep(0.5)
    assert proxy.body_bytes(".safetensors") - sent < MIB
    assert next(tensors, None) is None
    budget = process_engine(model.settings).budget
    process_engine(model.settings).slabs.trim()
    assert budget.used_bytes == 0


def test_a_stream_that_is_dropped_is_closed(put: ModelFactory) -> None:
    model = put(models.plain(8 * MIB, tensors=8), write_back="off")
    for _ in begin(model):
        break
    process_engine(model.settings).slabs.trim()
    assert process_engine(model.settings).budget.used_bytes == 0


def test_closing_from_another_thread_wakes_the_consumer(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.plain(8 * MIB, tensors=2))
    proxy.add(When(key=".safetensors", nth=2, times=None), Drip(1e5))
    tensors = begin(model)
    timer = threading.Timer(0.7, tensors.close)
    timer.name = "weightstream-test"
    timer.start()
    with pytest.raises(LoadCancelled, match="the stream was closed"):
        list(tensors)
    timer.join()


def test_names_and_dtype(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.sharded(3, 6 * MIB))
    name = "layers.2.mlp.weight"
    found = dict(begin(model, names=[name], dtype="float32"))
    assert models.same(found, {name: model.tensors[name].to(torch.float32)})
    assert not proxy.exchanges(When(key="00001-of", method="GET"))
    with pytest.raises(UsageError, match="no tensor 'x'"):
        next(begin(model, names=["x"]))
    with pytest.raises(UsageError, match="order"):
        begin(model, order="random")  # type: ignore[arg-type]


def test_what_goes_wrong_is_raised_after_what_went_well(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.plain(8 * MIB, tensors=8))
    proxy.add(When(key=".safetensors", covers=7 * MIB, times=None), Status(403, "AccessDenied"))
    with pytest.raises(AccessDeniedError, match=r"model\.safetensors"), begin(model) as tensors:
        for _ in tensors:
            pass
    with pytest.raises(FormatError):
        next(begin(put({"model.safetensors": b"{}"})))


def test_a_replaced_object_restarts_a_stream_that_yielded_nothing(
    put: ModelFactory, s3: S3Server
) -> None:
    model = put(models.plain(2 * MIB, seed="old"))
    dict(begin(model, names=["layer.0.weight"]))
    new = models.plain(2 * MIB, seed="new")
    s3.put_files(model.key, new)
    assert models.same(dict(begin(model)), models.tensors(new))


def test_two_versions_never_mix(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.plain(16 * MIB, tensors=16), memory_budget=4 * MIB, write_back="off")
    proxy.add(When(key=".safetensors", covers=12 * MIB, times=None), CHANGED)
    with begin(model) as tensors:
        next(tensors)
        with pytest.raises(ObjectChangedError):
            list(tensors)


@pytest.mark.slow
def test_peak_memory_is_bounded_by_the_budget(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.plain(256 * MIB, tensors=32), memory_budget=64 * MIB, chunk_size=8 * MIB)
    code = """
import torch, weightstream
from weightstream.settings import load_settings
from weightstream.cachefs.store import Store
import weightstream.loader, s3fs
settings = load_settings({"store": sys.argv[2], "memory_budget": 64 << 20,
                          "store_min_free_bytes": 0})
import resource
emit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
total = 0
for name, tensor in weightstream.stream(sys.argv[1], settings=settings):
    total += int(tensor.view(torch.uint8).sum())
emit(total)
"""
    outcome = run_python(code, model.uri, model.settings.store, env=client_env(proxy.url))
    expected = sum(int(t.view(torch.uint8).sum()) for t in model.tensors.values())
    assert outcome.value == expected
    base, peak = outcome.values[0], outcome.peak_rss_bytes
    assert peak - base <= (64 + 64) * MIB, "the budget and a little"
