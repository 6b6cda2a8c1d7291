"""Prefetch keeps everything, fetches each byte once, and waits for memory instead of skipping."""

import threading

import pytest
from tests.conftest import SettingsFactory
from tests.kit.faults import Latency, When
from tests.kit.models import sharded
from tests.kit.proxy import FaultProxy
from tests.kit.s3 import S3Server

from weightstream.cachefs.fetch import Progress, process_engine
from weightstream.cachefs.prefetch import prefetch
from weightstream.cachefs.store import Store
from weightstream.errors import LoadCancelled, StoreFullError

FILES = sharded(3, 12 << 20, seed="prefetch")
SIZE = sum(map(len, FILES.values()))
URI = "s3://models/prefetch"


@pytest.fixture(autouse=True)
def model(s3: S3Server, s3_env: dict[str, str]) -> None:
    """Put the model on the server, behind the proxy."""
    s3.put_files("models/prefetch", FILES)


def test_budget_smaller_than_a_file_loses_nothing(
    store_settings: SettingsFactory, proxy: FaultProxy
) -> None:
    settings = store_settings(memory_budget=2 << 20)
    with Store.open(settings) as store:
        report = prefetch(URI, settings, store)
        assert report.bytes_fetched == SIZE
        assert sum(info.present_bytes for info in store.blobs()) == SIZE
        assert all(info.complete for info in store.blobs())
    assert sum(e.body_bytes for e in proxy.exchanges() if e.range) == SIZE


def test_stored_bytes_are_the_origins(store_settings: SettingsFactory) -> None:
    settings = store_settings()
    with Store.open(settings) as store:
        prefetch(URI, settings, store)
        for info in store.blobs():
            with store.open_blob(info.blob) as stored:
                assert stored.map()[:] == FILES[info.blob.name]


def test_progress_ends_at_the_total_and_names_the_sources(
    store_settings: SettingsFactory,
) -> None:
    settings = store_settings()
    told: list[Progress] = []
    with Store.open(settings) as store:
        prefetch(f"{URI}/model-00001-of-00003.safetensors", settings, store)
        prefetch(URI, settings, store, told.append)
    here = len(FILES["model-00001-of-00003.safetensors"])
    assert told[-1].bytes_done == told[-1].bytes_total == SIZE
    assert told[-1].bytes_by_source == {"store": here, "origin": SIZE - here}
    assert [p.bytes_done for p in told] == sorted(p.bytes_done for p in told)


@pytest.mark.slow
def test_progress_that_raises_cancels(store_settings: SettingsFactory, proxy: FaultProxy) -> None:
    proxy.add(When(ranged=True, times=None), Latency(1.0))
    settings = store_settings()

    def stop(_: Progress) -> None:
        raise LoadCancelled("enough")

    with Store.open(settings) as store:
        with pytest.raises(LoadCancelled, match="enough"):
            prefetch(URI, settings, store, stop)
        assert process_engine(settings).write_back.drain(10)
        report = prefetch(URI, settings, store)
        assert report.bytes_fetched <= SIZE
        assert all(info.complete for info in store.blobs())


def test_two_at_once_fetch_each_byte_once(
    store_settings: SettingsFactory, proxy: FaultProxy
) -> None:
    settings = store_settings()
    with Store.open(settings) as store:
        threads = [
            threading.Thread(target=prefetch, args=(URI, settings, store), name=f"weightstream-{i}")
            for i in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert all(info.complete for info in store.blobs())
    assert sum(e.body_bytes for e in proxy.exchanges() if e.range) == SIZE


def test_model_that_does_not_fit_evicts_what_may_go_and_then_refuses(
    store_settings: SettingsFactory, s3: S3Server
) -> None:
    # A chunk under way is counted twice for a moment, so the limit leaves room for a few.
    s3.put_files("models/older", {"a.bin": b"x" * (9 << 20)})
    settings = store_settings(store_max_bytes=SIZE + (8 << 20))
    with Store.open(settings) as store:
        prefetch("s3://models/older", settings, store)
        prefetch(URI, settings, store)
        assert {info.blob.uri.split("/")[3] for info in store.blobs()} == {"prefetch"}
        store.pin(URI)
        s3.put_files("models/newer", {"b.bin": b"y" * (9 << 20)})
        with pytest.raises(StoreFullError, match=r"models/newer does not fit"):
            prefetch("s3://models/newer", settings, store)
