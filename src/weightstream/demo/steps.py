"""One process of the demo: `python -m weightstream.demo.steps TASK`.

The job is the same both ways: a checkpoint's tensors into memory, MiniLM into a module, one forward
pass. What differs is who brings the weights.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from weightstream.demo import minilm
from weightstream.demo.checksum import checksum_of, fingerprint
from weightstream.demo.messages import Reporter, Result, Task

if TYPE_CHECKING:
    from torch import Tensor

    from weightstream.cachefs.fetch import Progress
    from weightstream.loader import LoadReport

_PROGRESS_EVERY_S = 0.1

IMPORTS = "imports"
LIST, HEADERS, STREAM, MAP, FINISH = "list", "headers", "stream", "map", "finish"
DOWNLOAD, OPEN = "download", "load_file"
READ, MODEL, FORWARD = "read every byte", "MiniLM weights", "forward pass"
EXIT = "until exit"


def weightstream_job(task: Task, reporter: Reporter) -> Result:
    """Do the job with weightstream."""
    from weightstream.loader import load_with_report

    reporter.announce("stream the checkpoint")
    begin_s = time.time()
    loaded = load_with_report(task.checkpoint, progress=_throttled(reporter))
    ready_s = time.time() - begin_s
    _add_phases(reporter, begin_s, loaded.report)
    checksum = _read_every_byte(loaded.tensors, reporter)
    folder = Path(task.tokenizer)
    with reporter.phase(MODEL):
        model = minilm.from_weightstream(task.minilm, folder)
    with reporter.phase(FORWARD):
        embedding = minilm.embed(model, folder)
    sources = dict(loaded.report.bytes_by_source)
    return _result(reporter, loaded.tensors, ready_s, checksum, embedding, sources)


def _throttled(reporter: Reporter) -> "Callable[[Progress], None]":
    """Return a progress callback that speaks ten times a second."""
    next_s = 0.0

    def tell(progress: "Progress") -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + _PROGRESS_EVERY_S
            reporter.progress(progress.bytes_done, progress.bytes_total)

    return tell


def _add_phases(reporter: Reporter, begin_s: float, report: "LoadReport") -> None:
    """Turn a load's report into phases; what was in the store is mapped, not streamed."""
    reporter.add(LIST, begin_s, begin_s + report.resolve_s)
    reporter.add(HEADERS, begin_s + report.resolve_s, begin_s + report.header_s)
    ready_s = begin_s + report.ready_s
    if report.first_byte_s is None or report.last_byte_s is None:
        reporter.add(MAP, begin_s + report.header_s, ready_s)
        return
    reporter.add(STREAM, begin_s + report.header_s, begin_s + report.last_byte_s)
    reporter.add(FINISH, begin_s + report.last_byte_s, ready_s)


def _read_every_byte(tensors: "dict[str, Tensor]", reporter: Reporter) -> str:
    with reporter.phase(READ):
        return checksum_of(fingerprint(name, tensor) for name, tensor in tensors.items())


def _result(
    reporter: Reporter,
    tensors: "dict[str, Tensor]",
    ready_s: float,
    checksum: str,
    embedding: tuple[float, ...],
    sources: dict[str, int],
) -> Result:
    return Result(
        phases=tuple(reporter.phases),
        ready_s=ready_s,
        size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        tensors=len(tensors),
        sources=sources,
        checksum=checksum,
        embedding=embedding,
        peak_bytes=_peak_bytes(),
    )


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def usual_job(task: Task, reporter: Reporter) -> Result:
    """Do the job as most do: s3fs download to disk, then safetensors and transformers."""
    import s3fs
    from safetensors.torch import load_file

    filesystem = s3fs.S3FileSystem()
    scratch = Path(task.scratch)
    begin_s = time.time()
    with reporter.phase(DOWNLOAD):
        filesystem.get(task.checkpoint + "/", f"{scratch}/checkpoint/", recursive=True)
    with reporter.phase(OPEN):
        tensors: dict[str, Tensor] = {}
        for path in sorted((scratch / "checkpoint").glob("*.safetensors")):
            tensors.update(load_file(path))
    ready_s = time.time() - begin_s
    checksum = _read_every_byte(tensors, reporter)
    with reporter.phase(MODEL):
        filesystem.get(task.minilm + "/", f"{scratch}/minilm/", recursive=True)
        model = minilm.from_folder(scratch / "minilm")
    with reporter.phase(FORWARD):
        embedding = minilm.embed(model, scratch / "minilm")
    sources = {"download": sum(p.stat().st_size for p in (scratch / "checkpoint").iterdir())}
    return _result(reporter, tensors, ready_s, checksum, embedding, sources)


def main(text: str) -> None:
    """Do one task and print its result."""
    values = json.loads(text)
    task = Task(**{**values, "preload": tuple(values["preload"])})
    reporter = Reporter()
    with reporter.phase(IMPORTS):
        for module in task.preload:
            import_module(module)
    job = weightstream_job if task.step == "weightstream" else usual_job
    reporter.result(job(task, reporter))


if __name__ == "__main__":
    main(sys.argv[1])
