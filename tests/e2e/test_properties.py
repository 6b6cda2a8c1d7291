"""Hypothesis: whatever is asked, by whom and in which order, the bytes equal the origin's.

Against the real server, with the real engine and store, and other processes at the same time.
"""

from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.e2e.conftest import Scene
from tests.kit import faults as f
from tests.kit import jobs, models
from tests.kit.forked import Forked
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server, storage_options

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.fetch import Engine, Priority, Wanted
from weightstream.cachefs.origin import open_origin
from weightstream.cachefs.store import Store
from weightstream.loader import open as open_model
from weightstream.loader.host import HostLanding
from weightstream.settings import Settings, load_settings

_names = count()
SIZE = 700_001  # no multiple of anything
DATA = models.random_bytes(SIZE, "properties")
PAGE = 4096
RELAXED = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

offsets = st.one_of(
    st.integers(0, SIZE),
    st.integers(0, SIZE // PAGE).map(lambda page: page * PAGE),
    st.sampled_from([0, 1, SIZE - 1, SIZE, 65_536, 65_535, 65_537, 131_072]),
)
extents = st.lists(
    st.tuples(offsets, offsets).map(lambda ends: Extent(min(ends), max(ends))).filter(len),
    min_size=1,
    max_size=5,
)
breaks = st.sampled_from(
    [None, f.Reset(10_000), f.ShortBody(50_000), f.Drop(), f.INTERNAL_ERROR, f.SLOW_DOWN]
)


def make(
    folder: str, chunk_pages: int, range_pages: int, write_back: bool, budget: int
) -> Settings:
    return load_settings(
        {
            "store": Path(folder) / "store",
            "store_min_free_bytes": 0,
            "chunk_size": chunk_pages * PAGE,
            "range_size": range_pages * PAGE,
            "write_back": "on" if write_back else "off",
            "memory_budget": budget,
            "deadline_s": 20.0,
        }
    )


@pytest.mark.slow
@RELAXED
@given(
    wanted=st.lists(extents, min_size=1, max_size=3),
    chunk_pages=st.sampled_from([16, 17, 32, 100, 512]),
    range_pages=st.sampled_from([16, 40, 512]),
    write_back=st.booleans(),
    fault=breaks,
    boost=offsets,
)
def test_any_extents_by_several_flows_of_one_engine(
    s3: S3Server,
    proxy: FaultProxy,
    wanted: list[list[Extent]],
    chunk_pages: int,
    range_pages: int,
    write_back: bool,
    fault: f.Fault | None,
    boost: int,
) -> None:
    """Each list is one flow; all run at once over one store and one origin."""
    s3.put("models/properties/file.bin", DATA)
    proxy.clear()
    if fault is not None:
        proxy.add(f.When(key="file.bin", method="GET", nth=2), fault)
    with TemporaryDirectory() as folder:
        chosen = make(folder, chunk_pages, range_pages, write_back, 8 << 20)
        engine, store = Engine(chosen), Store.open(chosen)
        origin = open_origin("s3://models/properties", chosen, storage_options(proxy.url))
        (blob,) = origin.list("s3://models/properties/file.bin")
        landings = [HostLanding(blob) for _ in wanted]
        flows = [
            engine.start([Wanted(blob, landing, tuple(asked), Priority.PLANNED)], origin, store)
            for landing, asked in zip(landings, wanted, strict=True)
        ]
        at = min(boost, SIZE - 1)
        flows[0].boost(blob, Extent(at, at + 1))
        for flow, landing, asked in zip(flows, landings, wanted, strict=True):
            with flow:
                flow.join()
                for extent in asked:
                    assert landing.bytes_of(extent) == DATA[extent.start : extent.stop]
                flow.settle()
                landing.memory[:] = bytes(len(landing.memory))  # ours now: the store must not care
        assert engine.write_back.drain(20)
        check_store(store)
        origin.close()
        store.close()


def check_store(store: Store) -> None:
    """Whatever the store holds is the origin's."""
    for info in list(store.blobs()):
        stored = store.find_blob(info.blob)
        assert stored is not None
        for i in range(stored.n_chunks):
            chunk = stored.chunk(i)
            found = bytearray(len(chunk))
            if stored.read_into(i, 0, memoryview(found)):
                assert bytes(found) == DATA[chunk.start : chunk.stop]
        stored.close()


@pytest.mark.slow
@settings(RELAXED, max_examples=6)
@given(
    chunk_pages=st.sampled_from([16, 33, 256]),
    who=st.lists(st.sampled_from(["load", "readiness", "natural"]), min_size=2, max_size=3),
    fault=breaks,
    killed=st.booleans(),
)
def test_any_processes_at_once(
    scene: Scene, chunk_pages: int, who: list[str], fault: f.Fault | None, killed: bool
) -> None:
    """Loads and streams of one model at the same time, one of them killed at some moment."""
    right = jobs.digest(models.tensors(scene.files))
    scene.proxy.clear()
    if fault is not None:
        scene.proxy.add(f.When(key="-of-", ranged=True, nth=3), fault)
    with TemporaryDirectory() as folder:
        scene.use(store=Path(folder) / "store", chunk_size=chunk_pages * PAGE)
        victim = Forked(jobs.load, scene.uri, env=scene.env) if killed else None
        running = [
            Forked(jobs.load, scene.uri, env=scene.env)
            if how == "load"
            else Forked(jobs.stream, scene.uri, how, env=scene.env)
            for how in who
        ]
        if victim is not None:
            victim.wait_for(lambda: scene.proxy.body_bytes("-of-") > 1 << 20)
            victim.kill()
        for one in running:
            with one:
                result = one.result()
                assert (result if isinstance(result, str) else result.digest) == right
        with Forked(jobs.load, scene.uri, env=scene.env) as last:
            assert last.result().digest == right


@settings(RELAXED, max_examples=25)
@given(data=st.data(), dtype=st.sampled_from(["F32", "BF16", "U8"]), warm=st.booleans())
def test_any_slice_of_any_tensor(scene: Scene, data: st.DataObject, dtype: str, warm: bool) -> None:
    """`get_slice` fetches what it needs and equals the slice of the tensor."""
    import torch

    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    specs = [
        models.Spec("before", "U8", (data.draw(st.integers(0, 9)),)),
        models.Spec("t", dtype, shape),
    ]
    scene.files.clear()
    name = f"slice-{next(_names)}.safetensors"
    scene.put({name: models.shard(specs, name)})
    whole = models.tensors({name: scene.files[name]})["t"]
    index = tuple(
        slice(*sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in shape
    )
    options = storage_options(scene.proxy.url)
    uri = f"{scene.uri}/{name}"
    with open_model(uri, settings=scene.settings, storage_options=options) as opened:
        if warm:
            opened.get_tensor("t")
        part = opened.get_slice("t")[index]
    assert part.shape == whole[index].shape
    assert torch.equal(
        part.contiguous().flatten().view(torch.uint8),
        whole[index].contiguous().flatten().view(torch.uint8),
    )
