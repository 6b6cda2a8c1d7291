"""What is measured: cells (link, protocol, page cache) and the variants of peers in each.

Every row of the targets (`claims.py`) is computed from samples of these cells. Each peer runs with
its defaults and, where it has a knob for parallelism, with a sweep of it; the best setting found in
the same run is the one that counts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from weightstream.bench.jobs import Touch
from weightstream.bench.links import LOOPBACK, Link

Scenario = Literal["cold-load", "warm-load", "mount"]
PageCache = Literal["warm", "cold"]
SCENARIOS: tuple[Scenario, ...] = ("cold-load", "warm-load", "mount")

SWEEP = (4, 8, 16, 32)
WRITE_BACK_LINK_GBIT = 2.0
WS_OFF = "weightstream, write-back off"
WS_ON = "weightstream, write-back on"
WS_STREAM = "weightstream stream"
WS_CONSUME = "weightstream stream, 256 MiB budget"
STREAM_BUDGET_BYTES = 256 << 20  # far less than the model, so that the row means something
WS_PAIR = "weightstream, two processes"
WS_WARM = "weightstream, mapped from the store"
NATIVE = "safetensors load_file"
RUNAI = "runai"
CURL_FILES = "curl to tmpfs"
CURL_NULL = "curl to /dev/null"


@dataclass(frozen=True, slots=True)
class Variant:
    """One peer with one setting, as the tables name it."""

    label: str
    peer: str
    options: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    primed: bool = False  # run once, untimed, before every sample: the sample is a second process
    native: bool = False  # reads the model's own files, not the origin


@dataclass(frozen=True, slots=True)
class Cell:
    """Variants that are sampled in turns under the same conditions."""

    name: str
    title: str
    variants: tuple[Variant, ...]
    link: Link = LOOPBACK
    tls: bool = False
    page_cache: PageCache | None = None  # of the files that the sample reads; None: not local
    touch: Touch = "pages"
    processes: int = 1
    backed_models: int = 0  # how much free memory the host backs before each sample, in models


def cold_name(link: Link, tls: bool) -> str:
    """Return the name of a cold cell."""
    return f"cold/{link.name}/{'https' if tls else 'http'}"


def cells(
    scenarios: Sequence[Scenario], links: Sequence[Link], peers: Sequence[str] = ()
) -> tuple[Cell, ...]:
    """Return the cells of a run; `peers` keeps only those modules (all when empty)."""
    found: list[Cell] = []
    if "cold-load" in scenarios:
        found += (cell for link in links for cell in _cold_cells(link))
    if "warm-load" in scenarios:
        found += _warm_cells()
    return tuple(_kept(found, peers))


def _kept(found: Iterable[Cell], peers: Sequence[str]) -> Iterable[Cell]:
    for cell in found:
        variants = tuple(v for v in cell.variants if not peers or v.peer in peers)
        if variants:
            yield replace(cell, variants=variants)


def _cold_cells(link: Link) -> tuple[Cell, ...]:
    if link.gbit is not None:
        title = f"cold load, link shaped to {link.gbit:g} Gbit/s, HTTP"
        variants = (_curl("null", 1, 8), *_weightstream(), *_runai((8, 16)))
        return (Cell(cold_name(link, False), title, variants, link),)
    plain = (
        *(_curl("memory", processes, 8) for processes in (1, 2)),
        *_weightstream(),
        _ws(WS_STREAM, "off", mode="stream"),
        _consume(),
        *_runai(SWEEP),
        *_others(),
    )
    secure = (_curl("memory", 2, 8), *_weightstream(), *_runai(SWEEP))
    pair = (_ws(WS_PAIR, "on"),)
    return (
        Cell(cold_name(link, False), "cold load, loopback, HTTP", plain, backed_models=1),
        Cell(
            cold_name(link, True), "cold load, loopback, HTTPS", secure, tls=True, backed_models=1
        ),
        Cell("pair/loopback/http", "two processes, one cold store", pair, processes=2),
    )


def _ws(label: str, write_back: str, **options: str) -> Variant:
    return Variant(label, "weightstream", options, {"WEIGHTSTREAM_WRITE_BACK": write_back})


def _consume() -> Variant:
    """Return the variant that drops every tensor at once: what its memory then is, is the bound."""
    consume = _ws(WS_CONSUME, "off", mode="consume")
    budget = {"WEIGHTSTREAM_MEMORY_BUDGET": str(STREAM_BUDGET_BYTES)}
    return replace(consume, env=consume.env | budget)


def _weightstream() -> tuple[Variant, ...]:
    return _ws(WS_OFF, "off"), _ws(WS_ON, "on")


def _runai(sweep: Iterable[int]) -> tuple[Variant, ...]:
    settings = (
        Variant(f"{RUNAI}, concurrency {count}", "runai", env=_runai_env(count)) for count in sweep
    )
    return Variant(f"{RUNAI}, defaults", "runai"), *settings


def _runai_env(concurrency: int) -> dict[str, str]:
    return {"RUNAI_STREAMER_CONCURRENCY": str(concurrency)}


def _curl(sink: str, processes: int, connections: int) -> Variant:
    goal = CURL_FILES if sink == "memory" else CURL_NULL
    options = {"sink": sink, "processes": str(processes), "connections": str(connections)}
    return Variant(f"{goal}, {processes} x {connections}", "curl", options)


def _others() -> tuple[Variant, ...]:
    return (
        Variant("tensorizer, defaults", "tensorizer"),
        Variant("tensorizer, 4 readers", "tensorizer", {"readers": "4"}),
        Variant("s3torchconnector", "s3torchconnector"),
        Variant("s3torchconnector, 100 Gbit/s target", "s3torchconnector", {"target_gbps": "100"}),
        Variant("boto3 download, then safetensors", "boto3"),
        Variant("s3fs download, then safetensors", "s3fs"),
        Variant("safetensors-streaming", "safetensors_streaming"),
    )


def _warm_cells() -> tuple[Cell, ...]:
    title = "warm load, local disk, page cache"
    return (
        Cell("warm/cached", f"{title} warm", _local(), page_cache="warm", touch="bytes"),
        Cell(
            "warm/evicted",
            f"{title} evicted",
            _local(),
            page_cache="cold",
            touch="bytes",
            backed_models=1,
        ),
    )


def _local() -> tuple[Variant, ...]:
    """Return the peers on local files: as they come, and with the page cache where that is off."""
    buffered = {"RUNAI_STREAMER_FS_STRATEGY": "sync_buffered"}
    local = {"from": "files"}
    return (
        Variant(WS_WARM, "weightstream", {"warm": "yes"}, primed=True),
        Variant(NATIVE, "safetensors_file", native=True),
        Variant(f"{NATIVE}, pread", "safetensors_file", {"backend": "pread"}, native=True),
        Variant("runai on files, defaults", "runai", local, native=True),
        Variant("runai on files, buffered", "runai", local, buffered, native=True),
        Variant("fastsafetensors, defaults", "fastsafetensors", native=True),
        Variant(
            "fastsafetensors, buffered", "fastsafetensors", {},
            {"FASTSAFETENSORS_ODIRECT": "0"}, native=True,
        ),
    )  # fmt: skip
