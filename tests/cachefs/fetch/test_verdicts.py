"""The end-to-end check's verdict: one, in time, and before anything is sealed."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from awscrt import checksums
from tests.cachefs.fetch.sources import BufferLanding, FakeSource, content

from weightstream.cachefs.blob import Blob
from weightstream.cachefs.fetch import Engine, Flow, Wanted, flow
from weightstream.cachefs.origin import Checksum
from weightstream.cachefs.store import Store
from weightstream.errors import IntegrityError
from weightstream.settings import Settings

SIZE = 300_000
DATA = content(SIZE)
BLOBS = [Blob(f"s3://bucket/{i}", SIZE, "v1") for i in range(5)]


class SlowToAnswer(FakeSource):
    """Knows checksums, and takes its time."""

    def __init__(self, answer: Checksum | None, seconds: float) -> None:
        super().__init__(dict.fromkeys(BLOBS, DATA))
        self._answer = answer
        self._seconds = seconds

    def checksum(self, blob: Blob) -> Checksum | None:
        time.sleep(self._seconds)
        return self._answer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    settings = Settings(store=tmp_path / "store", chunk_size=64 << 10, store_min_free_bytes=0)
    store = Store.open(settings)
    yield store
    store.close()


@pytest.fixture
def engine(store: Store) -> Iterator[Engine]:
    settings = Settings(store=store.path, chunk_size=64 << 10, store_min_free_bytes=0)
    engine = Engine(settings)
    yield engine
    engine.close()


def landed(engine: Engine, source: FakeSource, blobs: list[Blob], store: Store | None) -> Flow:
    wanted = [Wanted(blob, BufferLanding(blob), (blob.whole(),)) for blob in blobs]
    flow = engine.start(wanted, source, store)
    for blob in blobs:
        flow.wait(blob, blob.whole(), 10)
    return flow


def test_an_origin_that_does_not_answer_is_waited_for_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "ANSWER_WAIT_S", 0.5)
    begun = time.monotonic()
    with landed(engine, SlowToAnswer(None, 1.0), BLOBS, None) as one:
        one.join()
    assert time.monotonic() - begun < 1.5


def test_close_does_not_wait_for_what_nobody_asks(engine: Engine) -> None:
    begun = time.monotonic()
    landed(engine, SlowToAnswer(None, 0.1), BLOBS, None).close()
    assert time.monotonic() - begun < 5


def test_nothing_is_sealed_while_somebody_judges(engine: Engine, store: Store) -> None:
    (blob, *_) = BLOBS
    one = landed(engine, SlowToAnswer(Checksum("crc64nvme", 1), 0.5), [blob], store)
    errors: list[IntegrityError] = []

    def join() -> None:
        with pytest.raises(IntegrityError) as caught:
            one.join()
        errors.append(caught.value)

    joining = threading.Thread(target=join)
    joining.start()
    time.sleep(0.1)
    one.close()
    joining.join()
    assert engine.write_back.drain(10)
    stored = store.find_blob(blob)
    assert stored is not None
    with stored:
        assert stored.present_bytes() == 0
    assert len(errors) == 1


def test_one_damaged_blob_does_not_cost_the_others(engine: Engine, store: Store) -> None:
    source = FakeSource(dict.fromkeys(BLOBS, DATA))
    for blob in BLOBS:
        source.checksums[blob] = Checksum("crc64nvme", checksums.crc64nvme(DATA))
    source.checksums[BLOBS[2]] = Checksum("crc64nvme", 1)
    with landed(engine, source, BLOBS, store) as one, pytest.raises(IntegrityError, match="/2:"):
        one.join()
    assert engine.write_back.drain(10)
    kept = []
    for blob in BLOBS:
        stored = store.find_blob(blob)
        assert stored is not None
        with stored:
            kept.append(stored.complete)
    assert kept == [True, True, False, True, True]
