"""Runs the cells of the scenario `mount`: mounts, works, measures, unmounts.

One sample is one fresh mount with caches in a stated condition, and fresh processes that work on
it. The servers' CPU time and memory count as well as the readers'.
"""

import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from weightstream.bench import measure
from weightstream.bench.certificates import make_certificates
from weightstream.bench.errors import BenchError
from weightstream.bench.jobs import Sample
from weightstream.bench.links import LOOPBACK, Link, Net, connect
from weightstream.bench.mounts.bucket import Bucket
from weightstream.bench.mounts.peers import ACCESS_KEY, SECRET_KEY
from weightstream.bench.mounts.plan import OURS, REPEATED, MountCell, Variant
from weightstream.bench.mounts.sample import Site, Trial
from weightstream.bench.mounts.sums import checksum
from weightstream.bench.servers import Server, nginx
from weightstream.demo.processes import clean_environment
from weightstream.errors import WeightstreamError

_WARM_AT_LEAST = 0.99
_RIVALS = 2  # the two fastest peers of the first round may change places


@dataclass(frozen=True, slots=True)
class MountBench:
    """What stays the same for all cells of a run."""

    bucket: Bucket
    work: Path  # scratch on disk
    repeats: int
    timeout_s: float
    report: Callable[[Sample], None]
    title: Callable[[MountCell], None]

    def run(self, cells: Sequence[MountCell]) -> tuple[str, tuple[Sample, ...]]:
        """Sample the cells, link by link; return the server's version and the samples."""
        samples: list[Sample] = []
        version = ""
        with _scratch(self.work / "kept"):
            for link, group in itertools.groupby(_by_link(cells), lambda cell: cell.link):
                with self._site(link) as site:
                    version = site.server.version
                    for cell in group:
                        self.title(cell)
                        samples += self._cell(cell, site)
        return version, tuple(samples)

    def checksums(self, cells: Sequence[MountCell]) -> tuple[tuple[str, str], ...]:
        """Return what the files of each cell must be."""
        known: dict[str, str] = {}
        for cell in cells:
            if cell.what not in known:
                known[cell.what] = checksum(self.bucket.paths(self.bucket.names(cell.what)))
        return tuple((cell.name, known[cell.what]) for cell in cells if known[cell.what])

    def _cell(self, cell: MountCell, site: Site) -> list[Sample]:
        samples: list[Sample] = []
        rounds = 1 if cell.is_counted else self.repeats * cell.rounds
        for number in range(rounds):
            variants = chosen(cell, samples) if number else cell.variants
            turn = number % len(variants)
            for variant in (*variants[turn:], *variants[:turn]):
                found = self._sample(cell, variant, site, number)
                samples += found
                for sample in found:
                    self.report(sample)
        return samples

    def _sample(self, cell: MountCell, variant: Variant, site: Site, number: int) -> list[Sample]:
        """Run one sample of a variant; a failure is a sample with its reason."""
        blank = Sample(cell.name, variant.label, number, None)
        kept = cell.state in ("complete", "evicted")
        name = re.sub(r"\W+", "-", variant.label) if kept else "scratch"
        scratch = self.work / "kept" / name
        try:
            os.sync()
            trial = Trial(site, cell, variant, scratch, blank, self.timeout_s)
            first = variant == next(v for v in cell.variants if v.family == variant.family)
            return trial.run(check=_ours(variant) or (number == 0 and first))
        except (WeightstreamError, OSError) as error:
            return [replace(blank, error=str(error).strip().splitlines()[-1])]
        finally:
            if not kept:
                shutil.rmtree(scratch, ignore_errors=True)

    @contextmanager
    def _site(self, link: Link) -> Iterator[Site]:
        """Make the link, and a server that answers from memory at its far end."""
        with ExitStack() as stack:
            net = stack.enter_context(connect(link))
            root = self.bucket.folder.parent
            certificates = make_certificates(self.work / "tls", (net.address,))
            server = stack.enter_context(
                nginx(
                    root, self.bucket.folder.name, self.work / "nginx", certificates, net.address,
                    net.server_prefix, list_keys=False,
                )
            )  # fmt: skip
            files = measure.files_under(self.bucket.folder)
            large = [path for path in files if path.stat().st_size >= 1 << 16]
            stack.enter_context(measure.kept_in_memory(large))
            if (found := measure.residency(large)) < _WARM_AT_LEAST:
                raise BenchError(f"only {found:.0%} of the bucket fits in memory; use --size")
            yield Site(self.bucket, self.work, net, server, _environment(server, net))


def chosen(cell: MountCell, samples: Sequence[Sample]) -> tuple[Variant, ...]:
    """Return what later rounds repeat: each family that a target names, at its best setting."""
    walls: dict[str, float] = {}
    for variant in cell.variants:
        found = [s.outcome.wall_s for s in samples if s.label == variant.label and s.outcome]
        if found:
            walls[variant.label] = median(found)
    ordered = sorted(cell.variants, key=lambda variant: walls.get(variant.label, math.inf))
    best = {variant.family: variant for variant in reversed(ordered)}
    peers = [v for v in best.values() if v.family not in REPEATED and v.label in walls]
    peers.sort(key=lambda variant: walls[variant.label])
    kept = [v for v in best.values() if v.family in REPEATED and (v.label in walls or _ours(v))]
    kept += peers[:_RIVALS] if cell.rivals else []
    return tuple(variant for variant in cell.variants if variant in kept) or cell.variants


def _ours(variant: Variant) -> bool:
    return variant.family == OURS


def _by_link(cells: Sequence[MountCell]) -> list[MountCell]:
    """Sort so that cells of one link are together, the loopback first."""
    return sorted(cells, key=lambda cell: (cell.link != LOOPBACK, cell.link.name))


def _environment(server: Server, net: Net) -> Mapping[str, str]:
    return clean_environment(os.environ) | {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": server.endpoint(tls=False),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Make an empty folder, and remove it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
