"""The messages between the benchmark and the process that works on a mounted directory."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

Work = Literal["read", "map", "tensors", "threads", "hold", "list", "find"]
THREADS = 64  # that fault, or read, at once


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does; it says `ready`, waits for a line, works, says `done`."""

    work: Work
    files: tuple[str, ...] = ()
    folder: str = ""
    passes: int = 1  # the median of so many counts; only where every pass finds the same state

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "files": tuple(values["files"])})


@dataclass(frozen=True, slots=True)
class Done:
    """What the process measured of itself: its first answer."""

    import_s: float
    wall_s: float  # of the median pass
    first_s: float  # until the first bytes, tensor or line were there
    cpu_s: float  # of all passes / passes
    started_at_s: float  # wall clock
    ready_at_s: float
    size_bytes: int  # that were read in one pass
    count: int  # files, tensors or lines
    rss_before_bytes: int
    rss_peak_bytes: int

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the line that the process printed."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class MountFacts:
    """What is known of a mount after a sample."""

    server_rss_bytes: int = 0  # the most that its processes ever had, together
    reads: int | None = None  # READ requests that reached the server while the sample worked
    gauges: int | None = None  # what the server still held after all was closed
    lists: int = 0  # listing requests while the sample worked
    most_lists: int = 0  # for one and the same prefix
