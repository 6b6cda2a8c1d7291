"""What is measured of mounts: cells, the state in which each finds a mount, variants of peers.

Peers run with their documentation's settings for large files and a small sweep around them. The
first round tries every setting. Later rounds repeat what a target compares: weightstream and the
native file, and where it is to beat the best peer, the two that were fastest. So a peer is judged
by its best setting, and the slow ones cost their time only once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from weightstream.bench.links import LOOPBACK, Link
from weightstream.bench.mounts.tasks import Work

State = Literal["cold", "complete", "evicted", "again"]
What = Literal["whole", "shards", "tree", "many"]

LINK = Link("5gbit", 5.0)
BUDGET_BYTES = 256 << 20  # of the server in the cell about memory
OURS = "weightstream"
OURS_PYTHON = "weightstream, fuse-python"
NATIVE = "native file"
RCLONE = "rclone"
RCLONE_CACHE = "rclone, cache"
S3FS = "s3fs-fuse"
S3FS_CACHE = "s3fs-fuse, cache"
CURL = "curl"
COLD = "mount/cold/loopback"
COLD_LINK = f"mount/cold/{LINK.name}"
COMPLETE_READ = "mount/complete/read"
COMPLETE_MAP = "mount/complete/map"
EVICTED = "mount/evicted/read"
AGAIN_READ = "mount/again/read"
TENSORS = "mount/tensors"
SHARDS = "mount/shards"
THREADS = "mount/threads"
EIGHT = "mount/eight"
LIST = "mount/list"
FIND = "mount/find"
HOLD = "mount/hold"
REPEATED = (OURS, NATIVE, CURL)  # families that later rounds always sample
PEERS = ("native", "weightstream", "rclone", "s3fs_fuse", "curl")


@dataclass(frozen=True, slots=True)
class Variant:
    """One peer with one setting; `family` is what the settings of a peer have in common."""

    label: str
    peer: str
    family: str
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MountCell:
    """Variants that are sampled in turns under the same conditions.

    State of the mount: `cold`, nothing was ever read; `complete`, freshly mounted after all was
    read through an earlier mount, and in the page cache; `evicted`, the same on disk only; `again`,
    the same work was done before, by another process, through this mount.
    """

    name: str
    title: str
    work: Work
    what: What
    variants: tuple[Variant, ...]
    state: State = "cold"
    link: Link = LOOPBACK
    processes: int = 1
    passes: int = 1
    rounds: int = 1  # times --repeat
    rivals: bool = False  # a target compares with the best peer
    is_counted: bool = False  # what matters is counted and not timed: one round tells it

    def passes_of(self, variant: Variant) -> int:
        """Return how often a process works; of what no target compares, once is enough."""
        return self.passes if variant.family in REPEATED else 1


def mount_cells(
    links: Sequence[Link], peers: Sequence[str] = (), *, quick: bool = False
) -> tuple[MountCell, ...]:
    """Return the cells of a run; `peers` keeps only those, `quick` one setting of each family."""
    every = [cell for cell in _cells() if cell.link in (LOOPBACK, *links)]
    return tuple(_kept(every, peers, quick))


def _kept(found: Iterable[MountCell], peers: Sequence[str], quick: bool) -> Iterable[MountCell]:
    for cell in found:
        variants = [v for v in cell.variants if not peers or v.peer in peers]
        if quick and cell.name == HOLD:
            variants = variants[:1]  # it takes as long as all other cells together
        if quick:
            variants = list({v.family: v for v in reversed(variants)}.values())[::-1]
        if variants:
            yield replace(cell, variants=tuple(variants), rounds=1 if quick else cell.rounds)


def _cells() -> tuple[MountCell, ...]:
    kept = (NATIVE_FILE, _ours(), _python(), *_rclone_cache()[:1], *_s3fs_cache()[:1])
    every = (_ours(), _python(), *_peers())
    best = (_ours(), _python(), *_rclone()[:1], *_rclone_cache()[:1], *_s3fs()[:1])
    title = "complete file, page cache"
    return (
        MountCell(
            COMPLETE_READ, f"{title} warm: read", "read", "whole", kept, "complete",
            passes=5, rounds=2,
        ),
        MountCell(
            COMPLETE_MAP, f"{title} warm: mmap, one byte of every page", "map", "whole", kept,
            "complete", passes=5, rounds=2,
        ),
        MountCell(EVICTED, f"{title} evicted: read", "read", "whole", kept[:3], "evicted"),
        MountCell(
            AGAIN_READ, "second open of a file that was cold: another process reads", "read",
            "whole", (NATIVE_FILE, *every[:2]), "again", passes=5,
        ),
        MountCell(COLD, "cold read, loopback", "read", "whole", every, rivals=True),
        MountCell(
            COLD_LINK, f"cold read, link shaped to {LINK.gbit:g} Gbit/s", "read", "whole",
            (CURL_NULL, *best), link=LINK,
        ),
        MountCell(SHARDS, "cold read of 4 shards, one after another", "read", "shards", every[:2]),
        MountCell(
            TENSORS, "safetensors.safe_open of 4 cold shards, every page touched", "tensors",
            "shards", every, rivals=True,
        ),
        MountCell(
            THREADS, "64 threads fault 4 cold shards in at once", "threads", "shards", every[:2],
        ),
        MountCell(
            EIGHT, "8 processes read one cold file", "read", "whole",
            (*every[:2], *_rclone_cache()[:1]), processes=8,
        ),
        MountCell(
            LIST, "ls -lR of 10,000 objects, warm", "list", "tree",
            (*best[:2], *_s3fs()[:1], *_rclone()[:1]), "again", rounds=2, rivals=True,
        ),
        MountCell(
            FIND, "find, twice within the TTL", "find", "tree", best[:2], "again",
            is_counted=True,
        ),
        MountCell(
            HOLD, f"{500} open files, 64 readers", "hold", "many",
            tuple(_small(v) for v in every[:2]), is_counted=True,
        ),
    )  # fmt: skip


NATIVE_FILE = Variant(NATIVE, "native", NATIVE)
CURL_NULL = Variant("curl to /dev/null, 8 connections", "curl", CURL)


def _ours() -> Variant:
    return Variant(OURS, "weightstream", OURS, {"driver": "kernel"})


def _python() -> Variant:
    return Variant(OURS_PYTHON, "weightstream", OURS_PYTHON, {"driver": "fuse-python"})


def _small(variant: Variant) -> Variant:
    return replace(variant, options={**variant.options, "memory_budget": str(BUDGET_BYTES)})


def _peers() -> tuple[Variant, ...]:
    return (*_rclone(), *_rclone_cache(), *_s3fs(), *_s3fs_cache())


def _rclone() -> tuple[Variant, ...]:
    return (
        _setting(RCLONE, "rclone", "8 streams of 16 MiB", cache="off"),
        _setting(RCLONE, "rclone", "16 streams of 4 MiB", cache="off", streams="16", chunk="4M"),
        _setting(
            RCLONE, "rclone", "1 stream", cache="off", streams="0", chunk="128M", buffer="128M"
        ),
    )


def _rclone_cache() -> tuple[Variant, ...]:
    return (
        _setting(RCLONE_CACHE, "rclone", "8 streams of 16 MiB", cache="full"),
        _setting(RCLONE_CACHE, "rclone", "1 stream", cache="full", streams="0", chunk="128M"),
    )


def _s3fs() -> tuple[Variant, ...]:
    return (
        _setting(S3FS, "s3fs_fuse", "16 x 16 MiB"),
        _setting(S3FS, "s3fs_fuse", "8 x 64 MiB", parallel="8", part="64"),
    )


def _s3fs_cache() -> tuple[Variant, ...]:
    return (_setting(S3FS_CACHE, "s3fs_fuse", "16 x 16 MiB", cache="yes"),)


def _setting(family: str, peer: str, setting: str, **options: str) -> Variant:
    return Variant(f"{family}, {setting}", peer, family, options)
