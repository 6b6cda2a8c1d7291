"""One sample: bring the mount into the cell's state, let processes work on it, count."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from weightstream.bench import measure
from weightstream.bench.errors import BenchError
from weightstream.bench.jobs import Job, Outcome, Sample
from weightstream.bench.links import LOOPBACK, Net
from weightstream.bench.mounts import family
from weightstream.bench.mounts.bucket import Bucket
from weightstream.bench.mounts.mounted import Mount, mounted
from weightstream.bench.mounts.peers import PEERS, Where
from weightstream.bench.mounts.plan import MountCell, Variant
from weightstream.bench.mounts.state import Status, wait_until_complete
from weightstream.bench.mounts.tasks import Done, MountFacts, Task
from weightstream.bench.servers import Server
from weightstream.demo.processes import Child

_COLD_AT_MOST = 0.01
_WARM_AT_LEAST = 0.99
_WARM_TRIES = 4  # a kernel that reclaims early (DAMON) may take pages away while others are read
_COLD_FETCHES_AT_LEAST = 0.99  # of its bytes, else it was not cold
_COMPLETE_S = 60.0
_GAUGES_S = 60.0  # a file is let go of some ten seconds after its last use
_RCLONE_NOTES_S = 7.0  # it notes what its cache holds five seconds after a file's last read
_READS_FILES = ("read", "map", "tensors", "threads", "hold")


@dataclass(frozen=True, slots=True)
class Site:
    """What a link's samples share: the bucket, its server, the environment of clients."""

    bucket: Bucket
    work: Path
    net: Net
    server: Server
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Trial:
    """One variant under the conditions of one cell."""

    site: Site
    cell: MountCell
    variant: Variant
    scratch: Path
    blank: Sample
    timeout_s: float

    def run(self, *, check: bool) -> list[Sample]:
        """Return a sample for each process; `check` lets the first read all once more, and sum."""
        if self.variant.peer == "curl":
            return [self._curl()]
        if self.variant.peer == "native":
            bucket = self.site.bucket
            files = bucket.paths(bucket.names(self.cell.what), bucket.natives)
            resident = self._set_page_cache(files)
            blank = replace(self.blank, resident=resident)
            return self._work(None, blank, self.site.server.mark(), check)
        if self.cell.state in ("complete", "evicted") and not self.scratch.exists():
            self._prime()
        resident = 0.0
        if self.cell.state in ("complete", "evicted"):
            resident = self._set_page_cache(measure.files_under(self.scratch))
        with self._mounted() as mount:
            mark = self.site.server.mark()
            if self.cell.state == "again":
                self._once(mount)
                resident = self._set_page_cache(measure.files_under(self.scratch))
            return self._work(mount, replace(self.blank, resident=resident), mark, check)

    def _back_free_memory(self) -> None:
        """Have twice the files' size of free memory ready; right before the work, or it is gone.

        A machine that gives free memory back to its host does so after two seconds, and to start a
        mount and import torch takes longer.
        """
        fetches = self.variant.peer != "native" and self.cell.state in ("cold", "again")
        if fetches and self.cell.link == LOOPBACK and self.cell.work in _READS_FILES:
            measure.back_free_memory(2 * sum(path.stat().st_size for path in self._natives()))

    def _natives(self) -> list[Path]:
        return list(self.site.bucket.paths(self.site.bucket.names(self.cell.what)))

    @contextmanager
    def _mounted(self) -> Iterator[Mount]:
        self.scratch.mkdir(parents=True, exist_ok=True)
        directory = self.site.work / "mnt"
        where = Where(
            self.site.server.endpoint(tls=False),
            self.site.bucket.folder.name,
            directory,
            self.scratch,
        )
        launch = PEERS[self.variant.peer](where, self.variant.options)
        log = self.site.work / "mount.log"
        with mounted(launch, directory, self.site.env, log, self.site.net.client_network) as mount:
            yield mount

    def _prime(self) -> None:
        """Read everything through a mount of its own, which leaves its cache behind."""
        with self._mounted() as mount:
            self._once(mount)
            if self.variant.peer == "rclone":
                time.sleep(_RCLONE_NOTES_S)

    def _once(self, mount: Mount) -> None:
        """Do the work in a process that is not measured; see that what it fetched is kept."""
        task = replace(self._task(mount), passes=1)
        with self._child(task) as child:
            child.expect("ready", self.timeout_s)
            child.say("go")
            child.expect("{", self.timeout_s)
            child.say("end")
            child.wait(self.timeout_s)
        if self.variant.peer == "weightstream" and task.files:
            wait_until_complete([Path(path) for path in task.files], _COMPLETE_S)

    def _task(self, mount: Mount | None) -> Task:
        root = mount.directory if mount else self.site.bucket.natives
        files = self.site.bucket.paths(self.site.bucket.names(self.cell.what), root)
        folder = root / self.site.bucket.tree
        return Task(self.cell.work, tuple(map(str, files)), str(folder), self._passes)

    def _child(self, task: Task) -> Child:
        command = (sys.executable, "-m", "weightstream.bench.mounts.work", task.to_json())
        errors = self.site.work / "stderr.log"
        errors.unlink(missing_ok=True)
        return Child(command, self.site.env, errors)

    def _set_page_cache(self, files: Sequence[Path]) -> float:
        """Bring the files behind a mount into the page cache, or out of it; look that it is so."""
        if self.cell.state == "evicted":
            measure.evict(files)
            found = measure.residency(files)
            if found > _COLD_AT_MOST:
                raise BenchError(f"{found:.1%} stayed in the page cache after eviction")
            return found
        if self.blank.round == 0:
            # What was written through the page cache lies there in 4 KiB pieces, which are mapped
            # one by one; what was read ahead, in large ones. All files are to be of one kind.
            measure.evict(files)
        found = 0.0
        for _ in range(_WARM_TRIES):
            measure.warm(files)
            found = measure.residency(files)
            if found >= _WARM_AT_LEAST or not files:
                break
        else:
            raise BenchError(f"only {found:.1%} of the files stayed in the page cache")
        return found

    def _work(
        self, mount: Mount | None, blank: Sample, mounted_mark: int, check: bool
    ) -> list[Sample]:
        """Let the cell's processes work at the same time; count until the last is done."""
        status = Status(mount.directory, self.scratch / "run") if mount and self._ours else None
        with ExitStack() as stack:
            children = [
                stack.enter_context(self._child(self._task(mount)))
                for _ in range(self.cell.processes)
            ]
            for child in children:
                child.expect("ready", self.timeout_s)
            self._back_free_memory()
            mark = self.site.server.mark()
            reads = status.reads() if status else None
            cpu_s = family.cpu_s(mount.pids()) if mount else 0.0
            for child in children:
                child.say("go")
            done = [Done.from_json(child.expect("{", self.timeout_s)) for child in children]
            cpu_s = (family.cpu_s(mount.pids()) if mount else 0.0) - cpu_s
            blank = self._counted(blank, mark, mounted_mark)
            facts = self._facts(mount, status, reads, mounted_mark)
            digest = self._ended(children, check)
        first = _outcome(done[0], cpu_s / self._passes, facts.server_rss_bytes, digest)
        rest = [_outcome(one, 0.0, 0, "") for one in done[1:]]
        return [
            replace(blank, outcome=first, mount=facts),
            *(Sample(blank.cell, blank.label, blank.round, outcome) for outcome in rest),
        ]

    @property
    def _passes(self) -> int:
        return self.cell.passes_of(self.variant)

    @property
    def _ours(self) -> bool:
        return self.variant.peer == "weightstream"

    def _counted(self, blank: Sample, mark: int, mounted_mark: int) -> Sample:
        """Add what the server sent; a cold sample that fetched less than its files is none."""
        traffic = self.site.server.traffic(mark)
        if self.cell.state == "cold":
            size = sum(path.stat().st_size for path in self._natives())
            sent = self.site.server.traffic(mounted_mark).data_bytes
            if sent < size * _COLD_FETCHES_AT_LEAST:
                raise BenchError(f"it was not cold: {sent} bytes fetched of {size}")
        return replace(
            blank,
            wire_bytes=traffic.wire_bytes,
            body_bytes=traffic.body_bytes,
            data_bytes=traffic.data_bytes,
            requests=traffic.requests,
            first_request_at_s=traffic.first_request_at_s,
        )

    def _facts(
        self, mount: Mount | None, status: Status | None, reads: int | None, mark: int
    ) -> MountFacts:
        """Return what is known of the mount now that the work is done."""
        if mount is None:
            return MountFacts()
        traffic = self.site.server.traffic(mark)  # since it was mounted
        facts = MountFacts(
            family.peak_rss_bytes(mount.pids()),
            lists=traffic.lists,
            most_lists=traffic.most_lists,
        )
        if status is None:
            return facts
        now = status.reads()
        return replace(
            facts,
            reads=now - reads if reads is not None else None,
            gauges=status.gauges(_GAUGES_S) if self.cell.work == "hold" else None,
        )

    def _ended(self, children: Sequence[Child], check: bool) -> str:
        """Let the processes end, the first after it has summed all files up when that is wanted."""
        digest = ""
        for child in children:
            if check and child is children[0] and self.cell.work in _READS_FILES:
                child.say("sum")
                digest = child.expect("sum", self.timeout_s).split()[1]
            else:
                child.say("end")
            child.wait(self.timeout_s)
        return digest

    def _curl(self) -> Sample:
        """Fetch the files over the link without a file system: what the link can do."""
        bucket = self.site.bucket
        names = bucket.names(self.cell.what)
        memory = self.site.work / "curl"
        memory.mkdir(exist_ok=True)
        job = Job(
            peer="curl",
            uri=f"s3://{bucket.folder.name}/x",
            endpoint=self.site.server.endpoint(tls=False),
            files=tuple(map(str, bucket.paths(names))),
            keys=names,
            memory=str(memory),
            options={"sink": "null", "processes": "1", "connections": "8"},
        )
        command = (sys.executable, "-m", "weightstream.bench.runners", job.to_json())
        prefix = self.site.net.client_network
        with Child((*prefix, *command), self.site.env, self.site.work / "stderr.log") as child:
            text, exit_s = child.outcome(self.timeout_s)
        return replace(self.blank, outcome=Outcome(**json.loads(text)), exit_s=exit_s)


def _outcome(done: Done, server_cpu_s: float, server_rss_bytes: int, digest: str) -> Outcome:
    return Outcome(
        import_s=done.import_s,
        load_s=done.wall_s,
        first_tensor_s=done.first_s,
        fault_s=0.0,
        checksum_s=0.0,
        cpu_s=done.cpu_s + server_cpu_s,
        rss_before_bytes=done.rss_before_bytes,
        rss_peak_bytes=done.rss_peak_bytes + server_rss_bytes,
        started_at_s=done.started_at_s,
        ready_at_s=done.ready_at_s,
        tensors=done.count,
        size_bytes=done.size_bytes,
        checksum=digest,
        maps=False,
    )
