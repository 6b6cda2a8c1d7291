"""One process that works on files: `python -m weightstream.bench.mounts.work TASK`.

The clock runs from the first open to the last byte. The checksum is a second reading after it, on
request: hashing in between would slow the fast and spare the slow.
"""

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from threading import Barrier, Thread

import numpy as np

from weightstream.bench import measure
from weightstream.bench.mounts.sums import checksum
from weightstream.bench.mounts.tasks import THREADS, Done, Task
from weightstream.bench.runners.base import preload

_BLOCK_BYTES = 1 << 20  # of a read: what cp, shutil and most loaders use, or more
_PIECE_BYTES = 256 << 10  # of a read of one of many readers
_PAGE_BYTES = mmap.PAGESIZE


class _Watch:
    """Stamps the first result of a pass."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()
        self.first_s = 0.0

    def first(self) -> None:
        self.first_s = self.first_s or time.perf_counter() - self.start_s


def _read(task: Task, watch: _Watch) -> tuple[int, int]:
    """Read the files one after another, as `cat` would."""
    buffer = bytearray(_BLOCK_BYTES)
    total = 0
    for path in task.files:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                watch.first()
                total += count
    return total, len(task.files)


def _map(task: Task, watch: _Watch) -> tuple[int, int]:
    """Map the files and read one byte of every page, in order."""
    total = 0
    for path in task.files:
        view = _mapped(path)
        watch.first()
        int(view[::_PAGE_BYTES].sum())
        total += view.size
    return total, len(task.files)


def _mapped(path: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _tensors(task: Task, watch: _Watch) -> tuple[int, int]:
    """Open every shard with stock safetensors and touch every page of every tensor."""
    from safetensors import safe_open

    total = count = 0
    for path in task.files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is not a dict)
                tensor = file.get_tensor(name)
                watch.first()
                measure.touch_pages({name: tensor})
                total += tensor.numel() * tensor.element_size()
                count += 1
    return total, count


def _threads(task: Task, watch: _Watch) -> tuple[int, int]:
    """Fault all files in from 64 threads at once, each in a stripe of its own."""
    views = [_mapped(path) for path in task.files]

    def fault(number: int) -> None:
        for view in views:
            stripe = -(-view.size // THREADS)
            int(view[number * stripe : (number + 1) * stripe : _PAGE_BYTES].sum())
            watch.first()

    _together(fault)
    return sum(view.size for view in views), len(views)


def _hold(task: Task, watch: _Watch) -> tuple[int, int]:
    """Keep all files open at once, and read them from 64 threads in pieces."""
    sizes = [0] * THREADS
    with ExitStack() as held:
        files = [held.enter_context(open(path, "rb", buffering=0)) for path in task.files]

        def read(number: int) -> None:
            buffer = bytearray(_PIECE_BYTES)
            for file in files[number::THREADS]:
                while count := file.readinto(buffer):
                    watch.first()
                    sizes[number] += count

        _together(read)
    return sum(sizes), len(task.files)


def _together(target: Callable[[int], None]) -> None:
    """Run in 64 threads that begin at the same time; raise the first error of any."""
    errors: list[Exception] = []
    gate = Barrier(THREADS)

    def run(number: int) -> None:
        gate.wait()
        try:
            target(number)
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=run, args=(i,), name=f"weightstream-{i}") for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _command(*words: str) -> Callable[[Task, _Watch], tuple[int, int]]:
    def run(task: Task, watch: _Watch) -> tuple[int, int]:
        command = [word.replace("FOLDER", task.folder) for word in words]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        watch.first()
        return 0, output.count(b"\n")

    return run


_WORKS: dict[str, Callable[[Task, _Watch], tuple[int, int]]] = {
    "read": _read,
    "map": _map,
    "tensors": _tensors,
    "threads": _threads,
    "hold": _hold,
    "list": _command("ls", "-lR", "FOLDER"),
    "find": _command("find", "FOLDER", "-type", "f"),
}


def _measured(task: Task, import_s: float) -> Done:
    work = _WORKS[task.work]
    rss_before_bytes = measure.rss_bytes()
    cpu_s, started_at_s = measure.cpu_s(), time.time()
    walls, watch, size, count = [], _Watch(), 0, 0
    for _ in range(task.passes):
        watch = _Watch()
        size, count = work(task, watch)
        walls.append(time.perf_counter() - watch.start_s)
    return Done(
        import_s=import_s,
        wall_s=median(walls),
        first_s=watch.first_s,
        cpu_s=(measure.cpu_s() - cpu_s) / task.passes,
        started_at_s=started_at_s,
        ready_at_s=time.time(),
        size_bytes=size,
        count=count,
        rss_before_bytes=rss_before_bytes,
        rss_peak_bytes=measure.peak_rss_bytes(),
    )


def _names(task: Task) -> Sequence[Path]:
    return [Path(path) for path in task.files]


def main(text: str) -> None:
    """Speak the protocol: ready, (go), done, (sum or end)."""
    began_s = time.perf_counter()
    task = Task.from_json(text)
    if task.work == "tensors":
        preload("torch", "safetensors.torch")
    import_s = time.perf_counter() - began_s
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(asdict(_measured(task, import_s))), flush=True)
    if sys.stdin.readline().strip() == "sum":
        print("sum", checksum(_names(task)), flush=True)


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    main(sys.argv[1])
