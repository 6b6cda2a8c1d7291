"""`load` from a real S3 server with authentication: cold, warm, parts of a model, changes."""

import gc
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import LogWatch
from tests.kit import models
from tests.kit.faults import ALWAYS, CHANGED, Drip, Status, When
from tests.kit.processes import run_python
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server
from tests.loader.attacks.corpus import ATTACKS, entry, file
from tests.loader.conftest import Model, ModelFactory

from weightstream.cachefs.fetch import Progress
from weightstream.errors import (
    AccessDeniedError,
    FormatError,
    LoadCancelled,
    NotFoundError,
    ObjectChangedError,
    UsageError,
)
from weightstream.loader import LoadReport, load, load_with_report
from weightstream.loader.dtypes import DTYPES
from weightstream.loader.headers import SPECULATIVE_BYTES
from weightstream.loader.plan import GAP_BYTES

MIB = 1 << 20


def get(model: Model, **given: object) -> dict[str, torch.Tensor]:
    settings = given.pop("settings", model.settings)
    return load(model.uri, settings=settings, storage_options=model.options, **given)  # type: ignore[arg-type]


def report(model: Model) -> LoadReport:
    found = load_with_report(model.uri, settings=model.settings, storage_options=model.options)
    assert models.same(found.tensors, model.tensors)
    return found.report


def every_dtype() -> dict[str, bytes]:
    """Return a model with each dtype that torch has, at odd offsets."""
    at, entries = 0, {}
    for dtype in DTYPES.values():
        if not dtype.name.startswith("F6"):
            size = 6 * 4 * dtype.bits // 8
            entries[f"{dtype.name}.odd"] = entry(at, at + 1, "U8", [1])
            entries[dtype.name] = entry(at + 1, at + 1 + size, dtype.name, [6, 4])
            at += 1 + size
    data = bytearray(models.random_bytes(at, "dtypes"))
    data[:25] = bytes(i % 2 for i in range(25))  # BOOL comes first, and copies normalise it
    return {"model.safetensors": file(entries, bytes(data))}


@pytest.mark.parametrize(
    "files",
    [models.tiny(), models.plain(5 * MIB), models.sharded(3, 9 * MIB), every_dtype()],
    ids=["tiny", "plain", "sharded", "dtypes"],
)
def test_cold_then_warm_equals_safetensors(
    put: ModelFactory, proxy: FaultProxy, files: dict[str, bytes]
) -> None:
    model = put(files)
    cold = report(model)
    assert cold.bytes_by_source == {"origin": model.weight_bytes}
    sent = proxy.body_bytes(model.key)
    assert proxy.body_bytes(".safetensors") >= model.weight_bytes
    assert sent <= sum(map(len, files.values())), "no byte was sent twice"
    model.wait_for_store()
    warm = report(model)
    assert set(warm.bytes_by_source) == {"mapped"}
    assert proxy.body_bytes(model.key) == sent
    order = (cold.resolve_s, cold.first_byte_s, cold.last_byte_s, cold.settle_s, cold.ready_s)
    times = [moment for moment in order if moment is not None]
    assert len(times) == 5
    assert times == sorted(times)


def test_without_write_back_nothing_is_kept(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.plain(3 * MIB), write_back="off")
    for loads in (1, 2):
        assert models.same(get(model), model.tensors)
        assert proxy.body_bytes(".safetensors") == loads * model.weight_bytes


def test_a_second_process_maps_without_contacting_the_origin(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.sharded(2, 4 * MIB))
    get(model)
    model.wait_for_store()
    proxy.clear()
    code = """
import torch, weightstream
from weightstream.settings import load_settings
settings = load_settings({"store": sys.argv[2]})
tensors = weightstream.load(sys.argv[1], settings=settings)
emit(sorted(tensors))
emit([m for m in ("s3fs", "botocore", "aiobotocore", "aiohttp", "fsspec") if m in sys.modules])
"""
    outcome = run_python(code, model.uri, model.settings.store)
    assert outcome.value == []
    assert outcome.values[0] == sorted(model.tensors)
    assert proxy.exchanges() == []


def test_names_fetch_their_own_bytes_only(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.sharded(3, 12 * MIB))
    wanted = ["layers.1.k.weight"]
    found = get(model, names=wanted)
    assert models.same(found, {n: model.tensors[n] for n in wanted})
    shards = {e.path.rsplit("/", 1)[-1] for e in proxy.exchanges(When(key="model-", method="GET"))}
    assert shards == {"model-00002-of-00003.safetensors"}
    most = found[wanted[0]].nbytes + SPECULATIVE_BYTES + GAP_BYTES
    assert proxy.body_bytes("model-") <= most


def test_names_of_one_tensor_of_the_header_range_cost_nothing_more(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.tiny())
    found = get(model, names=iter(["scale", "empty"]))
    assert models.same(found, {n: model.tensors[n] for n in ("scale", "empty")})
    assert len(proxy.exchanges(When(key="model.safetensors", method="GET"))) == 1


def test_a_header_longer_than_the_speculative_range_takes_one_more(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    entries = {f"{i:0200}": entry(i, i + 1, "U8") for i in range(2000)}
    model = put({"model.safetensors": file(entries, models.random_bytes(2000, "x"))})
    name = f"{1999:0200}"
    assert models.same(get(model, names=[name]), {name: model.tensors[name]})
    ranges = [e.range for e in proxy.exchanges(When(key="model.safetensors", method="GET"))]
    assert ranges[0] == (0, SPECULATIVE_BYTES)
    assert len(ranges) == 3
    assert models.same(get(model), model.tensors)


def test_unknown_names_and_bad_arguments_are_said_before_any_byte(put: ModelFactory) -> None:
    model = put(models.tiny())
    with pytest.raises(UsageError, match="no tensor 'nobody'"):
        get(model, names=["nobody", "scale"])
    for wrong, says in (
        ({"names": "scale"}, "names"),
        ({"names": [1]}, "names"),
        ({"names": str.isalpha}, "names"),
        ({"device": "meta"}, "meta"),
        ({"device": "nowhere"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "float99"}, "dtype"),
    ):
        with pytest.raises(UsageError, match=says):
            get(model, **wrong)


def test_dtype_casts_floating_tensors_only(put: ModelFactory) -> None:
    model = put(models.tiny())
    expected = {
        n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in model.tensors.items()
    }
    assert models.same(get(model, dtype=torch.bfloat16), expected)
    assert models.same(get(model, dtype="bfloat16"), expected)


def test_what_a_caller_writes_stays_its_own(put: ModelFactory) -> None:
    model = put(models.plain(4 * MIB))
    first = get(model)
    for tensor in first.values():
        tensor.zero_()  # at once: the write-back may be under way
    model.wait_for_store()
    warm = get(model)
    assert models.same(warm, model.tensors)
    for tensor in warm.values():
        tensor.zero_()
    assert models.same(get(model), model.tensors)


def test_dropping_tensors_frees_their_memory(put: ModelFactory) -> None:
    model = put(models.plain(64 * MIB, tensors=4), write_back="off", chunk_size=8 * MIB)
    found = get(model)
    before = resident_bytes()
    kept = found["layer.0.weight"]
    found.clear()
    gc.collect()
    assert before - resident_bytes() > 44 * MIB
    assert models.same(
        {"layer.0.weight": kept}, {"layer.0.weight": model.tensors["layer.0.weight"]}
    )


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def test_progress_is_told_on_the_callers_thread(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.plain(2 * MIB))
    proxy.add(replace(ALWAYS, key=".safetensors"), Drip(2e6))
    seen: list[Progress] = []
    threads = set()

    def hear(progress: Progress) -> None:
        seen.append(progress)
        threads.add(threading.current_thread())

    get(model, progress=hear)
    assert threads == {threading.current_thread()}
    assert len(seen) >= 3
    done = [p.bytes_done for p in seen]
    assert done == sorted(done)
    assert seen[-1].bytes_done == seen[-1].bytes_total == model.weight_bytes


def test_what_progress_raises_ends_the_load(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.plain(2 * MIB))
    proxy.add(replace(ALWAYS, key=".safetensors"), Drip(1e6))

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(model, progress=stop)
    assert proxy.body_bytes(".safetensors") < model.weight_bytes


HOSTILE = [a for a in ATTACKS if a.name in ("overlap", "hole", "bytes behind the last", "NaN")]


@pytest.mark.parametrize("attack", HOSTILE, ids=str)
def test_a_hostile_shard_is_refused_by_uri_and_leaves_nothing_running(
    put: ModelFactory, attack: object
) -> None:
    data, says = getattr(attack, "data", b""), getattr(attack, "says", "")
    model = put({"model.safetensors": data})
    with pytest.raises(FormatError, match=f"{model.uri}/model.safetensors: .*{says}"):
        get(model)
    with pytest.raises(FormatError, match=says):
        get(model, names=["a"])


def test_an_index_that_lies_is_refused(put: ModelFactory) -> None:
    files = models.sharded(2, MIB)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["extra"] = "model-00001-of-00002.safetensors"
    model = put(files | {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(FormatError, match="index puts tensor 'extra'"):
        get(model)
    del files["model-00002-of-00002.safetensors"]
    with pytest.raises(FormatError, match="model-00002-of-00002"):
        get(put(files))


def test_nothing_there_and_nothing_allowed_are_told_apart(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.tiny())
    with pytest.raises(NotFoundError):
        get(replace(model, uri=f"{model.uri}-nobody"))
    with pytest.raises(NotFoundError, match=r"no \*.safetensors"):
        get(put({"config.json": b"{}"}))
    proxy.add(replace(ALWAYS, key=".safetensors"), Status(403, "AccessDenied"))
    with pytest.raises(AccessDeniedError):
        get(model)


def test_an_object_replaced_meanwhile_is_loaded_in_its_new_version(
    put: ModelFactory, s3: S3Server, proxy: FaultProxy
) -> None:
    model = put(models.plain(3 * MIB, seed="old"))
    get(model, names=["layer.0.weight"])  # the listing is stored now
    new = models.plain(3 * MIB, seed="new")
    s3.put_files(model.key, new)
    assert models.same(get(model), models.tensors(new))


def test_an_object_that_is_replaced_again_and_again_is_an_error(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    model = put(models.plain(3 * MIB))
    proxy.add(replace(ALWAYS, key=".safetensors", ranged=True), CHANGED)
    with pytest.raises(ObjectChangedError, match=f"{model.uri}/model.safetensors"):
        get(model)
    lists = [e for e in proxy.exchanges() if "list-type" in e.path or e.path.endswith(".json")]
    assert len(lists) <= 4, "restarted once, not for ever"


def test_a_file_removed_behind_a_young_listing_is_looked_for_again(
    put: ModelFactory, s3: S3Server
) -> None:
    files = models.sharded(2, MIB)
    model = put(files)
    get(model, names=["layers.0.q.weight"])
    s3.delete(f"{model.key}/model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match=r"model-00002-of-00002.*not there"):
        get(model)


@pytest.mark.slow
def test_offline_uses_the_stored_version_and_says_so_once(
    put: ModelFactory, proxy: FaultProxy, expect_log: LogWatch
) -> None:
    model = put(models.sharded(2, 2 * MIB), listing_ttl_s=0.0)
    get(model)
    model.wait_for_store()
    proxy.__exit__(None, None, None)
    expect_log(f"using the stored version of {model.uri}")
    for _ in range(2):
        assert models.same(get(model), model.tensors)
    assert len(expect_log.messages("using the stored version")) == 1
    fresh = model.settings.model_copy(update={"fresh": True})
    with pytest.raises(Exception, match=model.uri) as caught:
        get(model, settings=fresh)
    assert getattr(caught.value, "transient", False)


def test_many_threads_may_load_at_once(put: ModelFactory, proxy: FaultProxy) -> None:
    model = put(models.sharded(2, 6 * MIB))
    results: list[bool] = []

    def work() -> None:
        results.append(models.same(get(model), model.tensors))

    threads = [threading.Thread(target=work, name="weightstream-test") for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 4
    assert proxy.body_bytes("model-") <= 1.05 * model.weight_bytes


def test_a_session_cancelled_from_another_thread_ends_the_load(
    put: ModelFactory, proxy: FaultProxy
) -> None:
    from weightstream.loader.report import Stopwatch
    from weightstream.loader.session import Session
    from weightstream.loader.streamed import Request
    from weightstream.loader.whole import load_whole

    model = put(models.plain(4 * MIB))
    proxy.add(replace(ALWAYS, key=".safetensors"), Drip(2e5))
    session = Session(model.uri, model.settings, model.options)
    timer = threading.Timer(0.5, session.cancel)
    timer.name = "weightstream-test"
    timer.start()
    with session, pytest.raises(LoadCancelled):
        load_whole(session, Request(torch.device("cpu"), bounded=False), Stopwatch(session.uri))
    timer.join()
