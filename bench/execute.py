"""Runs cells: makes the link and the server, samples the variants in turns, keeps what they say.

One sample is one fresh process (two where a cell says so) with a clean environment, a fresh store
or download folder, and a stated page cache. Between samples dirty pages are written, so that no
peer pays for another's.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from weightstream.bench import measure
from weightstream.bench.certificates import make_certificates
from weightstream.bench.errors import BenchError
from weightstream.bench.jobs import Job, Outcome, Sample
from weightstream.bench.links import Net, connect
from weightstream.bench.scenarios import Cell, Variant
from weightstream.bench.servers import Server, nginx
from weightstream.demo.checkpoint import Checkpoint
from weightstream.demo.processes import Child, clean_environment
from weightstream.errors import WeightstreamError

BUCKET = "bench"
_CLEANED = ("RUNAI_", "FASTSAFETENSORS_", "TENSORIZER_")
# Evicted means evicted: at most one page in a hundred may have come back by itself.
_COLD_AT_MOST = 0.01
_WARM_AT_LEAST = 0.99


@dataclass(frozen=True, slots=True)
class Place:
    """The folders of a run."""

    root: Path  # served by nginx: root/bucket/key
    work: Path  # scratch on disk
    memory: Path  # scratch on tmpfs


@dataclass(frozen=True, slots=True)
class Bench:
    """What stays the same for all cells of a run."""

    place: Place
    model: Checkpoint
    repeats: int
    timeout_s: float
    report: Callable[[Sample], None]

    @property
    def prefix(self) -> str:
        """Return the model's prefix in the bucket."""
        return self.model.folder.name

    def run(self, cell: Cell) -> tuple[str, list[Sample]]:
        """Sample a cell; return the server's version and the samples."""
        samples: list[Sample] = []
        with (
            _served(self, cell) as (net, server),
            self._bucket_in_memory(cell),
            _scratch(self.place.work / "store") as store,
        ):
            for number in range(self.repeats):
                turn = number % len(cell.variants)
                for variant in (*cell.variants[turn:], *cell.variants[:turn]):
                    found = _Sampling(self, cell, net, server, store).sample(variant, number)
                    samples += found
                    for sample in found:
                        self.report(sample)
        return server.version, samples

    @contextmanager
    def _bucket_in_memory(self, cell: Cell) -> Iterator[None]:
        """Make sure that the server reads from memory; it is not what is measured."""
        if cell.page_cache is not None:
            yield
            return
        folders = (self.place.root / BUCKET).glob(f"{self.prefix}*")
        files = [path for folder in folders for path in measure.files_under(folder)]
        with measure.kept_in_memory(files):
            found = measure.residency(files)
            if found < _WARM_AT_LEAST:
                raise BenchError(f"only {found:.0%} of the bucket fits in memory; use --size")
            yield


@dataclass(frozen=True, slots=True)
class _Sampling:
    """The conditions of one cell."""

    bench: Bench
    cell: Cell
    net: Net
    server: Server
    store: Path

    def sample(self, variant: Variant, number: int) -> list[Sample]:
        """Run one sample of a variant; a failure is a sample with its reason."""
        blank = Sample(self.cell.name, variant.label, number, None)
        with (
            _scratch(self.bench.place.work / "scratch") as scratch,
            _scratch(self.bench.place.memory) as memory,
        ):
            job = self._job(variant, scratch, memory)
            env = self._environment(variant, scratch)
            try:
                if variant.primed:
                    self._prime(job, env)
                resident = self._set_page_cache(variant)
                os.sync()
                return self._measured(replace(blank, resident=resident), job, env, scratch)
            except (WeightstreamError, OSError) as error:
                return [replace(blank, error=str(error).strip().splitlines()[-1])]

    def _job(self, variant: Variant, scratch: Path, memory: Path) -> Job:
        prefix = self.bench.prefix
        return Job(
            peer=variant.peer,
            uri=f"s3://{BUCKET}/{prefix}",
            endpoint=self.server.endpoint(self.cell.tls),
            ca_bundle=str(self.server.ca_bundle) if self.cell.tls else "",
            files=tuple(str(path) for path in self.bench.model.files),
            keys=tuple(f"{prefix}/{path.name}" for path in self.bench.model.files),
            scratch=str(scratch),
            memory=str(memory),
            touch=self.cell.touch,
            backed_bytes=self.cell.backed_models * self.bench.model.size_bytes,
            gated=self.cell.processes > 1,
            options=variant.options,
        )

    def _environment(self, variant: Variant, scratch: Path) -> dict[str, str]:
        store = self.store if variant.primed else scratch / "store"
        base = clean_environment(os.environ, *_CLEANED)
        base |= {
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench-secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.server.endpoint(self.cell.tls),
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            "WEIGHTSTREAM_STORE": str(store),
        }
        if self.cell.tls:
            authority = str(self.server.ca_bundle)
            base |= dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"), authority)
        return base | variant.env

    def _prime(self, job: Job, env: Mapping[str, str]) -> None:
        """Be the first process: after it the store is complete and its listing is young."""
        options = {**job.options, "warm": "no"}
        with self._child(replace(job, options=options, gated=False), env) as child:
            child.outcome(self.bench.timeout_s)

    def _set_page_cache(self, variant: Variant) -> float:
        if self.cell.page_cache is None:
            return 0.0
        files = list(self.bench.model.files)
        if not variant.native:
            files = measure.files_under(self.store)
        if self.cell.page_cache == "warm":
            measure.warm(files)
            found = measure.residency(files)
            if found < _WARM_AT_LEAST:
                raise BenchError(f"only {found:.1%} of the files stayed in the page cache")
            return found
        measure.evict(files)
        found = measure.residency(files)
        if found > _COLD_AT_MOST:
            raise BenchError(f"{found:.1%} of the files stayed in the page cache after eviction")
        return found

    def _child(self, job: Job, env: Mapping[str, str]) -> Child:
        command = (sys.executable, "-m", "weightstream.bench.runners", job.to_json())
        errors = self.bench.place.work / "stderr.log"
        errors.unlink(missing_ok=True)
        return Child((*self.net.client_prefix, *command), env, errors)

    def _measured(
        self, blank: Sample, job: Job, env: Mapping[str, str], scratch: Path
    ) -> list[Sample]:
        mark = self.server.mark()
        children = [self._child(job, env) for _ in range(self.cell.processes)]
        try:
            if job.gated:
                for child in children:
                    child.expect("ready", self.bench.timeout_s)
                for child in children:
                    child.say("go")
            found = [_ended(blank, child, self.bench.timeout_s) for child in children]
        finally:
            for child in children:
                child.close()
        traffic = self.server.traffic(mark)
        found[0] = replace(
            found[0],
            wire_bytes=traffic.wire_bytes,
            body_bytes=traffic.body_bytes,
            requests=traffic.requests,
            first_request_at_s=traffic.first_request_at_s,
            stored_bytes=measure.allocated_bytes(scratch),
        )
        return found


def _ended(blank: Sample, child: Child, timeout_s: float) -> Sample:
    text, exit_s = child.outcome(timeout_s)
    return replace(blank, outcome=Outcome(**json.loads(text)), exit_s=exit_s)


@contextmanager
def _served(bench: Bench, cell: Cell) -> Iterator[tuple[Net, Server]]:
    """Make the cell's link and a server at its far end."""
    with connect(cell.link) as net:
        certificates = make_certificates(bench.place.work / "tls", (net.address,))
        folder = bench.place.work / "nginx"
        with nginx(
            bench.place.root, BUCKET, folder, certificates, net.address, net.server_prefix
        ) as server:
            yield net, server


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make an empty folder, and remove it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def convert(bench: Bench, options: Sequence[tuple[str, str]] = ()) -> None:
    """Write the model in tensorizer's own format beside it, once."""
    folder = bench.model.folder.with_name(bench.prefix + "-tensorizer")
    if (folder / "model.tensors").exists():
        return
    part = folder.with_name(folder.name + ".part")
    with _scratch(part):
        files = tuple(str(path) for path in bench.model.files)
        job = Job("tensorizer", files=files, options={"convert": str(part), **dict(options)})
        command = (sys.executable, "-m", "weightstream.bench.runners", job.to_json())
        log = bench.place.work / "stderr.log"
        with Child(command, clean_environment(os.environ, *_CLEANED), log) as child:
            child.outcome(bench.timeout_s)
        folder.mkdir(exist_ok=True)
        os.replace(part / "model.tensors", folder / "model.tensors")
