"""The protocol of one sample: set up, (wait), load, touch, print one JSON line."""

import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass

from weightstream.bench import measure
from weightstream.bench.jobs import Job, Outcome
from weightstream.bench.runners import peer
from weightstream.bench.runners.base import Peer, Tensors
from weightstream.demo.checksum import checksum_of, fingerprint


@dataclass(frozen=True, slots=True)
class _Timing:
    started_at_s: float
    ready_at_s: float
    load_s: float
    first_tensor_s: float
    cpu_s: float


class _Stopwatch:
    """Stamps the first tensor; later calls are ignored."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()
        self.first_s = 0.0

    def first(self) -> None:
        self.first_s = self.first_s or time.perf_counter() - self.start_s


def _timed_load(chosen: Peer, job: Job) -> tuple[Tensors | None, _Timing]:
    gc.collect()
    cpu_s = measure.cpu_s()
    started_at_s = time.time()
    watch = _Stopwatch()
    tensors = chosen.load(job, watch.first)
    load_s = time.perf_counter() - watch.start_s
    ready_at_s = time.time()
    cpu_s = measure.cpu_s() - cpu_s
    return tensors, _Timing(started_at_s, ready_at_s, load_s, watch.first_s or load_s, cpu_s)


def _sizes(job: Job, tensors: Tensors | None) -> int:
    if tensors is None:
        return sum(os.path.getsize(path) for path in job.files)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def run(job: Job) -> Outcome:
    """Run one sample in this process."""
    began_s = time.perf_counter()
    chosen = peer(job.peer)
    chosen.setup(job)
    import_s = time.perf_counter() - began_s
    measure.back_free_memory(job.backed_bytes)
    if job.gated:
        print("ready", flush=True)
        sys.stdin.readline()
    rss_before_bytes = measure.rss_bytes()
    tensors, timing = _timed_load(chosen, job)
    rss_peak_bytes = measure.peak_rss_bytes()
    measure.prepare_checksum()
    fault_s = measure.touch_pages(tensors) if tensors and job.touch == "pages" else 0.0
    began_s = time.perf_counter()
    parts = [fingerprint(name, tensor) for name, tensor in (tensors or {}).items()]
    checksum_s = time.perf_counter() - began_s
    return Outcome(
        import_s=import_s,
        load_s=timing.load_s,
        first_tensor_s=timing.first_tensor_s,
        fault_s=fault_s,
        checksum_s=checksum_s,
        cpu_s=timing.cpu_s,
        rss_before_bytes=rss_before_bytes,
        rss_peak_bytes=rss_peak_bytes,
        started_at_s=timing.started_at_s,
        ready_at_s=timing.ready_at_s,
        tensors=len(tensors or {}),
        size_bytes=_sizes(job, tensors),
        checksum=checksum_of(parts) if parts else "",
        maps=chosen.maps,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(run(Job.from_json(sys.argv[1])))), flush=True)
