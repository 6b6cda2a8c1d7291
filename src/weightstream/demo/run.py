"""Runs the demo: a server, two models, two nodes, three processes, one table and one picture."""

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

from weightstream.cachefs.fetch import Progress as Fetching
from weightstream.demo import minilm
from weightstream.demo.checkpoint import write_checkpoint
from weightstream.demo.messages import PHASE, PROGRESS, RESULT, Phase, Result, Step, Task
from weightstream.demo.nodes import Fetched, Node, agents, make_nodes
from weightstream.demo.processes import Child, clean_environment
from weightstream.demo.server import S3Server, serve
from weightstream.demo.show import Lane, findings, findings_of_peer, print_table
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
    """What the processes share."""

    work: Path
    server: S3Server
    checkpoint: str
    minilm: str
    bars: Progress

    def environment(self) -> dict[str, str]:
        """Return what reaches the server, and nothing else of ours or its clients'."""
        return clean_environment(os.environ) | self.server.environment()

    def lane(self, title: str, step: Step, preload: tuple[str, ...], node: Node) -> Lane:
        """Run one process on a node to its end; return what it did, when, and what was sent."""
        scratch = self.work / "scratch"
        scratch.mkdir()
        task = Task(
            step, self.checkpoint, self.minilm, str(minilm.packaged_folder()), str(scratch), preload
        )
        environment = self.environment() | node.environment()
        # Whatever torch leaves in a temporary folder goes away with ours.
        environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(scratch)}
        command = (sys.executable, "-m", "weightstream.demo.steps", task.to_json())
        begin_s, sent_bytes = time.time(), self.server.sent_bytes()
        try:
            with Child(command, environment, self.work / "stderr.log") as child:
                result = self._follow(child, title)
                child.wait(_STEP_TIMEOUT_S)
            sent_bytes = self.server.sent_bytes() - sent_bytes
            return Lane(title, begin_s, _with_end(result), sent_bytes)
        finally:
            shutil.rmtree(scratch)

    def fetch(self, node: Node) -> Fetched:
        """Bring MiniLM's weights to a node from the one that has them."""
        bar = self.bars.add_task("weightstream, second node", total=None)
        weights = "model.safetensors"

        def told(progress: Fetching) -> None:
            self.bars.update(bar, completed=progress.bytes_done, total=progress.bytes_total)

        file = minilm.packaged_folder() / weights
        fetched = node.fetch(f"{self.minilm}/{weights}", file, self.server, told)
        self.bars.update(bar, completed=1, total=1)
        self.bars.stop_task(bar)
        return fetched

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
        lanes, fetched = _prepare_and_run(work, size_bytes, bars)
    print_table(lanes, fetched, Console())
    draw(lanes, picture)
    wrong = findings(lanes) + findings_of_peer(fetched)
    for text in wrong:
        console.print(f"wrong: {text}", style="bold red", highlight=False)
    print(f"timeline: {picture}")
    return 1 if wrong else 0


def _prepare_and_run(
    work: Path, size_bytes: int, bars: Progress
) -> tuple[tuple[Lane, ...], Fetched]:
    name = f"llama-{size_bytes / (1 << 30):g}gib"
    bar = bars.add_task(f"write a {size_bytes / (1 << 30):g} GiB checkpoint", total=None)
    write_checkpoint(work / "bucket" / BUCKET / name, size_bytes, _SHARDS)
    bars.update(bar, completed=1, total=1)
    with serve(work / "bucket", work) as server:
        uri = f"{BUCKET}/all-minilm-l6-v2"
        _put(server, minilm.packaged_folder(), uri, f"{BUCKET}/{name}", bars)
        demo = _Demo(work, server, f"s3://{BUCKET}/{name}", f"s3://{uri}", bars)
        return _run_all(demo)


def _run_all(demo: _Demo) -> tuple[tuple[Lane, ...], Fetched]:
    """Run one process after the other; between them a second node gets MiniLM from the first."""
    ours = "weightstream.loader"
    first, second = nodes = make_nodes(demo.work, 2)
    cold = demo.lane("weightstream, cold", "weightstream", (*_HEAVY, "s3fs", ours), first)
    with agents(demo.work, nodes, demo.environment()) as running:
        title = "weightstream, second process"
        warm = demo.lane(title, "weightstream", (*_HEAVY, ours), first)
        running.wait_acquainted()
        fetched = demo.fetch(second)
    preload = (*_HEAVY, "s3fs", "safetensors.torch")
    return (cold, warm, demo.lane("s3fs, then safetensors", "usual", preload, first)), fetched


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
