"""One node of a cluster: loads a file when told to, serves its peers until told to end.

`python -m weightstream.bench.cluster.node JOB` with the job as JSON. Lines on stdin: `go`, then
anything to end; on stdout: `ready`, then the result as JSON.
"""

import json
import os
import random
import resource
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from weightstream import metrics
from weightstream.bench import jobs
from weightstream.bench.runners import runai_peer
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Flow, Wanted, process_engine
from weightstream.cachefs.fetch.memory import allocate
from weightstream.cachefs.fetch.source import Source
from weightstream.cachefs.origin import open_origin
from weightstream.cachefs.store import Store
from weightstream.log import configure
from weightstream.p2p.exchange.server import Server
from weightstream.p2p.exchange.wire import Channel
from weightstream.p2p.peering import open_peering
from weightstream.settings import load_settings

_FIRST_FAULT_S = 1.0
_BETWEEN_FAULTS_S = 0.15


@dataclass(frozen=True, slots=True)
class Job:
    """What a node is to do."""

    uri: str
    settings: dict[str, Any]
    peered: bool = True
    loader: str = "weightstream"
    """Or `runai`: Run:ai Model Streamer as it is installed, from the origin."""
    store: bool = False
    """Keep what is fetched, as a loader on the node would."""
    load: bool = True
    """False: only serve."""
    lies: bool = False
    """Flip a bit of whatever it sends to peers."""
    faults: int = 0
    """Read that many chunks at random places while the load runs, as page faults do."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a node measured; `digest` is the BLAKE3 of what it read."""

    seconds: float
    cpu_s: float
    digest: str
    sources: dict[str, float]
    fault_s: tuple[float, ...] = ()
    error: str = ""


class _Lease:
    def __init__(self, view: memoryview) -> None:
        self.view = view

    def hold(self) -> None:
        return

    def release(self) -> None:
        return


class _Whole:
    """All of a file in memory of its own."""

    exposes_memory = True

    def __init__(self, size: int) -> None:
        self.memory = memoryview(allocate(size))[:size]

    def reserve(self, extent: Extent) -> _Lease:
        return _Lease(self.memory[extent.start : extent.stop])

    def landed(self, extent: Extent) -> None:
        return


def main() -> None:
    """Run a node."""
    job = Job(**json.loads(sys.argv[1]))
    settings = load_settings(job.settings)
    configure(settings.log_level)
    if job.loader == "runai":
        _run_runai(job)
        return
    if job.lies:
        _lie()
    engine = process_engine(settings)
    origin = open_origin(job.uri, settings)
    store = Store.open(settings) if job.store else None
    exchange = None
    if job.peered:
        exchange = open_peering(settings, store, engine, lambda blob: origin)
    (blob,) = origin.list(job.uri)
    print("ready", flush=True)
    sys.stdin.readline()
    if job.load:
        result = _load(job, exchange or origin, blob, store)
        print(json.dumps(asdict(result)), flush=True)
    sys.stdin.readline()
    if exchange is not None:
        exchange.close()


def _run_runai(job: Job) -> None:
    """Load with Run:ai Model Streamer; the digest is that of the tensors' bytes."""
    asked = jobs.Job("runai", uri=job.uri.rpartition("/")[0])
    runai_peer.PEER.setup(asked)
    print("ready", flush=True)
    sys.stdin.readline()
    began_s, began_cpu_s = time.monotonic(), _cpu_s()
    tensors = runai_peer.PEER.load(asked, lambda: None) or {}
    seconds, cpu_s = time.monotonic() - began_s, _cpu_s() - began_cpu_s
    hasher = blake3()
    for _, tensor in sorted(tensors.items()):
        hasher.update(tensor.numpy().tobytes())
    result = Result(seconds, cpu_s, hasher.hexdigest(), {})
    print(json.dumps(asdict(result)), flush=True)
    sys.stdin.readline()


def _lie() -> None:
    """Have this process send wrong bytes, with the digest of the right ones."""

    def send(
        server: Server, channel: Channel, view: memoryview, sent: int, count: int, fault: bool
    ) -> int:
        wrong = bytearray(view[sent:count])
        if wrong:
            wrong[0] ^= 1
        channel.sock.sendall(wrong)
        return count

    patched: Any = Server
    patched._send_some = send


def _load(job: Job, source: Source, blob: Blob, store: Store | None) -> Result:
    engine = process_engine(load_settings(job.settings))
    landing = _Whole(blob.size)
    began_s, began_cpu_s = time.monotonic(), _cpu_s()
    wanted = [Wanted(blob, landing, (blob.whole(),))]
    error, fault_s = "", [0.0] * 0
    with engine.start(wanted, source, store) as flow:
        faulter = threading.Thread(target=_fault, args=(job, flow, blob, fault_s))
        if job.faults:
            faulter.start()
        try:
            flow.wait(blob, blob.whole())
        except Exception as failure:
            error = repr(failure)
        seconds, cpu_s = time.monotonic() - began_s, _cpu_s() - began_cpu_s
        if job.faults:
            faulter.join()
    digest = blake3(landing.memory).hexdigest()
    return Result(seconds, cpu_s, digest, _bytes(), tuple(fault_s), error)


def _fault(job: Job, flow: Flow, blob: Blob, seconds: list[float]) -> None:
    """Wait for one chunk after the other that has not landed, as page faults do."""
    chunk_bytes = load_settings(job.settings).chunk_size
    chunks = list(range(-(-blob.size // chunk_bytes)))
    random.Random(7).shuffle(chunks)
    time.sleep(_FIRST_FAULT_S)
    for i in chunks:
        extent = Extent(i * chunk_bytes, min((i + 1) * chunk_bytes, blob.size))
        if len(seconds) == job.faults or flow.ended:
            return
        if not flow.brings(blob, extent):
            continue
        began_s = time.monotonic()
        flow.boost(blob, extent)
        flow.wait(blob, extent)
        seconds.append(time.monotonic() - began_s)
        time.sleep(_BETWEEN_FAULTS_S)


def _bytes() -> dict[str, float]:
    found = {}
    for name, value in metrics.samples().items():
        if name.startswith("weightstream_peer_bytes_total"):
            found[name.split('"')[1]] = value
    return found


def _cpu_s() -> float:
    """Return what this process and those that it started have used: the swarm has one."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime + sum(map(_cpu_of_s, _children()))


def _children() -> list[str]:
    found: list[str] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError):  # the thread has ended
            found += path.read_text().split()
    return found


def _cpu_of_s(pid: str) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
