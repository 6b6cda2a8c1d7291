"""What the demo's processes tell their parent, one JSON line each on stdout."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Step = Literal["weightstream", "usual"]
PHASE = "phase "
PROGRESS = "progress "
RESULT = "result "


@dataclass(frozen=True, slots=True)
class Task:
    """The job of one process: the checkpoint into memory, MiniLM into a module, one forward."""

    step: Step
    checkpoint: str  # s3://bucket/prefix
    minilm: str
    tokenizer: str  # local folder with MiniLM's tokenizer and configuration
    scratch: str  # local folder for downloads
    preload: tuple[str, ...]  # imported before anything is timed as work

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class Phase:
    """A named stretch of wall-clock time."""

    name: str
    begin_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """Return how long it took."""
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True)
class Result:
    """What one process did."""

    phases: tuple[Phase, ...]
    ready_s: float  # from the call to the checkpoint's last tensor
    size_bytes: int
    tensors: int
    sources: dict[str, int] = field(default_factory=dict)  # bytes by source
    checksum: str = ""
    embedding: tuple[float, ...] = ()
    peak_bytes: int = 0

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Read the line of a child."""
        values: dict[str, Any] = json.loads(text.removeprefix(RESULT))
        phases = tuple(Phase(**phase) for phase in values.pop("phases"))
        return cls(phases=phases, **{**values, "embedding": tuple(values["embedding"])})


class Reporter:
    """Collects the phases of this process and tells the parent about them."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block as a phase."""
        self.announce(name)
        begin_s = time.time()
        yield
        self.add(name, begin_s, time.time())

    def announce(self, name: str) -> None:
        """Tell the parent what comes now."""
        print(PHASE + name, flush=True)

    def add(self, name: str, begin_s: float, end_s: float) -> None:
        """Keep a phase that was timed elsewhere."""
        self.phases.append(Phase(name, begin_s, end_s))

    def progress(self, done: int, total: int) -> None:
        """Tell the parent how far the present phase is."""
        print(f"{PROGRESS}{done} {total}", flush=True)

    def result(self, result: Result) -> None:
        """Tell the parent everything; the last line."""
        print(RESULT + json.dumps(asdict(result)), flush=True)
