"""Runs the demo: a server, two models, three processes, one table and one picture."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from weightstream.demo import minilm
from weightstream.demo.checkpoint import write_checkpoint
from weightstream.demo.messages import PHASE, PROGRESS, RESULT, Phase, Result, Step, Task
from weightstream.demo.processes import Child, clean_environment
from weightstream.demo.server import S3Server, serve
from weightstream.demo.show import Lane, findings, print_table
from weightstream.demo.steps import EXIT
from weightstream.demo.timeline import draw
from weightstream.errors import UsageError

BUCKET = "models"
_HEAVY = ("torch", "transformers.models.bert.modeling_bert")
_FILES = ("*.json", "model.safetensors", "vocab.txt")
_SHARDS = 4
_STEP_TIMEOUT_S = 300.0
# Bucket, store and download: three copies of the checkpoint, and what the store leaves free.
_COPIES, _SPARE_BYTES = 3, 3 << 30


@dataclass(frozen=True, slots=True)
class _Demo:
    """What the three processes share."""

    work: Path
    server: S3Server
    checkpoint: str
    minilm: str
    bars: Progress

    def lane(self, title: str, step: Step, preload: tuple[str, ...]) -> Lane:
        """Run one process to its end; return what it did and when."""
        scratch = self.work / "scratch"
        scratch.mkdir()
        task = Task(
            step, self.checkpoint, self.minilm, str(minilm.packaged_folder()), str(scratch), preload
        )
        environment = clean_environment(os.environ) | self.server.environment()
        environment["WEIGHTSTREAM_STORE"] = str(self.work / "store")
        # Whatever torch leaves in a temporary folder goes away with ours.
        environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)}
        command = (sys.executable, "-m", "weightstream.demo.steps", task.to_json())
        begin_s = time.time()
        try:
            with Child(command, environment, self.work / "stderr.log") as child:
                result = self._follow(child, title)
                child.wait(_STEP_TIMEOUT_S)
            return Lane(title, begin_s, _with_end(result))
        finally:
            shutil.rmtree(scratch)

    def _follow(self, child: Child, title: str) -> Result:
        bar = self.bars.add_task(title, total=None)
        deadline = time.monotonic() + _STEP_TIMEOUT_S
        while True:
            line = child.expect("", deadline - time.monotonic())
            if line.startswith(PHASE):
                self.bars.update(bar, description=f"{title}: {line.removeprefix(PHASE)}")
            elif line.startswith(PROGRESS):
                done, total = line.removeprefix(PROGRESS).split()
                self.bars.update(bar, completed=int(done), total=int(total))
            elif line.startswith(RESULT):
                self.bars.update(bar, description=title, completed=1, total=1)
                self.bars.stop_task(bar)
                return Result.from_json(line)


def _with_end(result: Result) -> Result:
    """Add the time from the result to the end of the process, in which write-back may go on."""
    last_s = result.phases[-1].end_s
    return replace(result, phases=(*result.phases, Phase(EXIT, last_s, time.time())))


def run_demo(picture: Path = Path("weightstream-demo.png"), size_bytes: int = 1 << 30) -> int:
    """Run the demo; return 0 when every check held, 1 when one did not."""
    console = Console(stderr=True)
    with _work_folder(size_bytes) as work, _bars(console) as bars:
        lanes = _lanes(work, size_bytes, bars)
    print_table(lanes, Console())
    draw(lanes, picture)
    wrong = findings(lanes)
    for text in wrong:
        console.print(f"wrong: {text}", style="bold red", highlight=False)
    print(f"timeline: {picture}")
    return 1 if wrong else 0


def _lanes(work: Path, size_bytes: int, bars: Progress) -> tuple[Lane, ...]:
    name = f"llama-{size_bytes / (1 << 30):g}gib"
    bar = bars.add_task(f"write a {size_bytes / (1 << 30):g} GiB checkpoint", total=None)
    write_checkpoint(work / "bucket" / BUCKET / name, size_bytes, _SHARDS)
    bars.update(bar, completed=1, total=1)
    with serve(work / "bucket", work) as server:
        uri = f"{BUCKET}/all-minilm-l6-v2"
        _put(server, minilm.packaged_folder(), uri, f"{BUCKET}/{name}", bars)
        demo = _Demo(work, server, f"s3://{BUCKET}/{name}", f"s3://{uri}", bars)
        ours, warm = "weightstream.loader", "weightstream, second process"
        return (
            demo.lane("weightstream, cold", "weightstream", (*_HEAVY, "s3fs", ours)),
            demo.lane(warm, "weightstream", (*_HEAVY, ours)),
            demo.lane("s3fs, then safetensors", "usual", (*_HEAVY, "s3fs", "safetensors.torch")),
        )


def _put(server: S3Server, folder: Path, uri: str, checkpoint: str, bars: Progress) -> None:
    """Upload MiniLM, and have the server hash the checkpoint (its ETags) before anyone waits."""
    import s3fs

    bar = bars.add_task("put all-MiniLM-L6-v2 into the bucket", total=None)
    # rclone repeats an upload's checksum in answers to ranged reads, where it is wrong.
    filesystem = s3fs.S3FileSystem(
        key=server.access_key,
        secret=server.secret_key,
        endpoint_url=server.endpoint,
        config_kwargs={"request_checksum_calculation": "when_required"},
    )
    for path in (path for pattern in _FILES for path in folder.glob(pattern)):
        filesystem.put_file(str(path), f"{uri}/{path.name}")
    filesystem.ls(checkpoint, detail=True)
    bars.update(bar, completed=1, total=1)


@contextmanager
def _work_folder(size_bytes: int) -> Iterator[Path]:
    """Make a folder for everything, and remove it."""
    with tempfile.TemporaryDirectory(prefix="weightstream-demo-") as name:
        needed = _COPIES * size_bytes + _SPARE_BYTES
        free = shutil.disk_usage(name).free
        if free < needed:
            room = f"{needed >> 30} GiB, {free >> 30} GiB are free"
            raise UsageError(f"{name}: the demo needs {room}; set TMPDIR to a larger disk")
        yield Path(name)


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
    )
