"""The life of a process that loads: threads, forks, cancellation, signals, leaks, eviction."""

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.conftest import LogWatch
from tests.e2e.conftest import Scene
from tests.kit import faults as f
from tests.kit import jobs, models
from tests.kit.processes import Child, run_python, start_python
from tests.kit.s3 import storage_options

import weightstream
from weightstream import stream
from weightstream.cachefs.fetch import Progress, process_engine
from weightstream.cachefs.store import Store
from weightstream.errors import LoadCancelled, WeightstreamError

MIB = 1 << 20


def test_threads_of_one_process_share_a_cold_load(scene: Scene) -> None:
    scene.put(models.sharded(3, 24 * MIB, seed=scene.prefix))
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.Drip(40 * MIB))
    digests: list[str] = []
    threads = [
        threading.Thread(target=lambda: digests.append(jobs.digest(scene.load()))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert digests == [jobs.digest(models.tensors(scene.files))] * 4
    assert scene.proxy.body_bytes("-of-") <= 1.05 * scene.size


def test_what_a_caller_writes_stays_his_own(scene: Scene) -> None:
    """Into cold tensors while write-back may still run, into mapped ones at any time."""
    for _ in range(2):  # cold, then mapped
        for tensor in scene.load().values():
            tensor.zero_()
        scene.drain()
        assert scene.loads_right()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_loads_good_and_bad_leak_nothing(scene: Scene, expect_log: LogWatch) -> None:
    expect_log.allow("")
    scene.use(write_back="off", deadline_s=0.6, concurrency=2, hedge="off")
    engine = process_engine(scene.settings)
    pooled = 2 * 3  # two connections may stay open: our end, and both of the proxy's here

    def once(fault: f.Fault | None) -> None:
        scene.proxy.clear()
        if fault is not None:
            scene.proxy.add(f.When(key="-of-", ranged=True, nth=2, times=None), fault)
        try:
            scene.load()
        except WeightstreamError:
            assert fault is not None

    def all_kinds() -> None:
        faults: list[f.Fault | None] = [None, f.FORBIDDEN, f.Reset(1000), f.SLOW_DOWN, None]
        for fault in [*faults, f.CHANGED, f.Drop(), None]:
            once(fault)
        gc.collect()

    all_kinds()
    before = open_files()
    all_kinds()
    all_kinds()
    deadline = time.monotonic() + 5
    while (
        open_files() > before + pooled or engine.budget.used_bytes
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert open_files() <= before + pooled
    assert engine.budget.used_bytes == 0


def test_an_abandoned_stream_gives_everything_back(scene: Scene) -> None:
    scene.put(models.sharded(3, 48 * MIB, seed=scene.prefix))
    engine = process_engine(scene.settings)
    options = storage_options(scene.proxy.url)
    with stream(scene.uri, settings=scene.settings, storage_options=options) as tensors:
        next(tensors)
    scene.drain()
    deadline = time.monotonic() + 5
    while engine.budget.used_bytes and time.monotonic() < deadline:
        time.sleep(0.02)
    assert engine.budget.used_bytes == 0
    assert scene.loads_right()


def test_a_slow_consumer_bounds_what_is_fetched_ahead(scene: Scene) -> None:
    scene.put(models.sharded(3, 96 * MIB, seed=scene.prefix))
    scene.use(memory_budget=16 * MIB, write_back="off")
    options = storage_options(scene.proxy.url)
    with stream(scene.uri, settings=scene.settings, storage_options=options) as tensors:
        _, first = next(tensors)
        time.sleep(1.0)
        ahead = scene.proxy.body_bytes("-of-") - first.numel() * first.element_size()
        # The proxy counts what it has handed to the kernel: sockets hold some MiB each.
        assert ahead <= 16 * MIB + 32 * MIB
        right = models.tensors(scene.files)
        rest = dict(tensors)
    assert len(rest) == len(right) - 1


def test_a_progress_callback_that_raises_ends_the_load(scene: Scene) -> None:
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.Drip(2 * MIB))

    def stop(progress: Progress) -> None:
        if progress.bytes_done:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        scene.load(progress=stop)
    assert time.monotonic() - started < 5
    sent = scene.proxy.body_bytes("-of-")
    time.sleep(0.5)
    assert scene.proxy.body_bytes("-of-") <= sent + 4 * MIB  # nothing more is asked for


def test_a_stream_closed_by_another_thread(scene: Scene) -> None:
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.Stall(20, 1000))
    options = storage_options(scene.proxy.url)
    scene.use(stall_timeout_s=30.0, deadline_s=30.0, hedge="off")
    tensors = stream(scene.uri, settings=scene.settings, storage_options=options)
    closer = threading.Timer(0.5, tensors.close)
    closer.start()
    started = time.monotonic()
    with pytest.raises((LoadCancelled, StopIteration)):
        next(tensors)
    assert time.monotonic() - started < 5
    closer.join()


def test_a_forked_child_loads_too(scene: Scene) -> None:
    code = """
import os
from tests.kit.jobs import digest
from weightstream import load
mine = digest(load(sys.argv[1]))
child = os.fork()
if not child:
    os._exit(0 if digest(load(sys.argv[1] + "-2")) != mine else 1)
_, status = os.waitpid(child, 0)
emit([mine == digest(load(sys.argv[1])), os.waitstatus_to_exitcode(status)])
"""
    scene.s3.put_files(f"models/{scene.prefix}-2", models.sharded(2, 4 * MIB, seed="other"))
    assert run_python(code, scene.uri, env=scene.env).value == [True, 0]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_line_at_once(scene: Scene, kind: signal.Signals) -> None:
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.Drip(64 << 10))
    command = [sys.executable, "-m", "weightstream.cli", "prefetch", scene.uri]
    with Child(command, env=scene.env | {"WEIGHTSTREAM_HEDGE": "off"}) as child:
        child.wait_for(lambda: len(scene.proxy.exchanges(f.When(key="-of-"))) > 2)
        child.process.send_signal(kind)
        outcome = child.result(15)
    assert "Traceback" not in outcome.stderr
    assert outcome.returncode in (130, -kind, 128 + kind)


def test_the_store_stays_within_its_limit(
    scene: Scene, tmp_path: Path, expect_log: LogWatch
) -> None:
    # What is still open cannot be evicted: a shard that finds no room just then is not kept.
    expect_log.allow("store has room for")
    limit = 16 * MIB
    scene.use(store_max_bytes=limit)
    for i in range(4):
        scene.s3.put_files(f"models/{scene.prefix}/m{i}", models.sharded(2, 6 * MIB, seed=f"m{i}"))
        uri = f"{scene.uri}/m{i}"
        options = storage_options(scene.proxy.url)
        found = weightstream.load(uri, settings=scene.settings, storage_options=options)
        assert models.same(found, models.tensors(models.sharded(2, 6 * MIB, seed=f"m{i}")))
        del found
        scene.drain()
    store = Store.open(scene.settings)
    assert store.usage_bytes() <= limit
    kept = {info.blob.uri.split("/")[-2] for info in store.blobs() if info.complete}
    assert "m3" in kept
    assert "m0" not in kept
    store.close()


def test_a_process_that_exits_at_once_still_keeps_what_it_fetched(scene: Scene) -> None:
    """Write-back has `exit_flush_s` to end; the next process finds all of it."""
    scene.put(models.sharded(3, 48 * MIB, seed=scene.prefix))
    code = "from weightstream import load; load(sys.argv[1]); emit()"
    run_python(code, scene.uri, env=scene.env)
    scene.proxy.clear()
    assert scene.loads_right()
    assert scene.proxy.body_bytes("-of-") == 0


def test_the_interpreter_ends_while_a_stream_is_open(scene: Scene) -> None:
    scene.proxy.add(f.When(key="-of-", ranged=True, times=None), f.Drip(256 << 10))
    code = """
from weightstream import stream
tensors = stream(sys.argv[1])
next(tensors)
emit("got one")
"""
    with start_python(code, scene.uri, env=scene.env) as child:
        outcome = child.result(40)
    assert outcome.value == "got one"
    assert outcome.stderr == ""
