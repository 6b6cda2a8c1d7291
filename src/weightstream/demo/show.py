"""The demo's table, and the checks that decide whether it was right."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from weightstream.demo.messages import Result
from weightstream.demo.minilm import similarity
from weightstream.demo.nodes import Fetched
from weightstream.demo.steps import FORWARD, IMPORTS, MODEL, READ

# Both ways run the same torch kernels on the same bytes; anything else than rounding is wrong.
_TOLERANCE = 1e-6
_SOURCES = {"origin": "streamed", "mapped": "mapped", "download": "to disk, mapped"}
# What an origin sends to whom it sends no chunk: listings and checksums, some kB. A chunk is 8 MiB.
_QUESTIONS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Lane:
    """One process: its title, when it began (wall clock), what it did, what the origin sent it."""

    title: str
    begin_s: float
    result: Result
    origin_bytes: int = 0  # answers to listings and all

    def phase_s(self, name: str) -> float:
        """Return the seconds spent in the phases of one name."""
        return sum(phase.length_s for phase in self.result.phases if phase.name == name)


def print_table(lanes: Sequence[Lane], fetched: Fetched, console: Console) -> None:
    """Print one column per process, and a line for the second node."""
    size = lanes[0].result.size_bytes / (1 << 30)
    title = f"{size:.2f} GiB checkpoint, then all-MiniLM-L6-v2"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for lane in lanes:
        table.add_column(lane.title, justify="right")
    rows = [_column(lane) for lane in lanes]
    for name in rows[0]:
        table.add_row(name, *(row[name] for row in rows))
    console.print(table)
    console.print(
        f"second node: {_size(fetched.size_bytes)} in {_seconds(fetched.elapsed_s)}, "
        f"{_size(fetched.received_bytes)} from its peer over TLS, "
        f"{_size(fetched.origin_bytes)} from the origin",
        highlight=False,
    )
    embedding = lanes[0].result.embedding
    console.print(
        f"MiniLM, cosine: related sentences {similarity(embedding, 0, 1):.2f}, "
        f"unrelated {similarity(embedding, 0, 2):.2f}",
        highlight=False,
    )


def _column(lane: Lane) -> dict[str, str]:
    result = lane.result
    return {
        "imports": _seconds(lane.phase_s(IMPORTS)),
        "checkpoint ready": _seconds(result.ready_s),
        "  rate": f"{result.size_bytes / 1e9 / result.ready_s:.2f} GB/s",
        "  bytes": _SOURCES.get(next(iter(result.sources), ""), "-"),
        "origin sent": _size(lane.origin_bytes),
        "every byte read": _seconds(lane.phase_s(READ)),
        "MiniLM ready": _seconds(lane.phase_s(MODEL)),
        "forward pass": _seconds(lane.phase_s(FORWARD)),
        "peak memory": f"{result.peak_bytes / (1 << 20):.0f} MiB",
    }


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 0.9995 else f"{value:.2f} s"


def _size(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def findings(lanes: Sequence[Lane]) -> list[str]:
    """Return what is wrong; nothing when the demo proved what it should."""
    cold, warm, usual = lanes
    wrong = []
    for lane in (cold, warm):
        if lane.result.checksum != usual.result.checksum:
            wrong.append(f"{lane.title}: the tensors differ from safetensors'")
        if (error := _difference(lane.result, usual.result)) > _TOLERANCE:
            wrong.append(f"{lane.title}: MiniLM's embedding is off by {error:.2g}")
    if set(warm.result.sources) != {"mapped"}:
        found = ", ".join(warm.result.sources) or "nowhere"
        wrong.append(f"{warm.title}: bytes came from {found}, not from the store's mapping")
    embedding = cold.result.embedding
    if not similarity(embedding, 0, 1) > similarity(embedding, 0, 2):
        wrong.append("MiniLM finds the unrelated sentence closer")
    return wrong


def findings_of_peer(fetched: Fetched) -> list[str]:
    """Return what is wrong with a file whose every byte should have come from another node."""
    wrong = []
    if not fetched.is_right:
        wrong.append("second node: its store has other bytes than the bucket")
    if fetched.received_bytes < fetched.size_bytes:
        got = f"{_size(fetched.received_bytes)} of {_size(fetched.size_bytes)}"
        wrong.append(f"second node: {got} came from its peer")
    if fetched.origin_bytes > _QUESTIONS_BYTES:
        wrong.append(f"second node: the origin sent {_size(fetched.origin_bytes)}")
    return wrong


def _difference(first: Result, second: Result) -> float:
    if len(first.embedding) != len(second.embedding):
        return float("inf")
    pairs = zip(first.embedding, second.embedding, strict=True)
    return max(abs(a - b) for a, b in pairs)
