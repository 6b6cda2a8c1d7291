"""The messages of a benchmark: what one sample shall do, and what it measured.

A sample runs in a process of its own (`python -m weightstream.bench.runners`): it gets a `Job` as
JSON on its command line and prints an `Outcome` as one JSON line. The parent adds what only it can
see (bytes that the server sent, exit time) and keeps the result as a `Sample`.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from weightstream.bench.mounts.tasks import MountFacts

Touch = Literal["pages", "bytes"]


@dataclass(frozen=True, slots=True)
class Job:
    """What one process shall load, from where, and with which options of its peer."""

    peer: str
    uri: str = ""  # s3://bucket/model
    endpoint: str = ""  # http://host:port
    ca_bundle: str = ""
    files: tuple[str, ...] = ()  # the model's safetensors files on local disk
    keys: tuple[str, ...] = ()  # and their keys in the bucket
    scratch: str = ""  # a fresh folder on disk
    memory: str = ""  # a fresh folder on tmpfs
    touch: Touch = "pages"
    backed_bytes: int = 0  # free memory that the machine's host shall back before the clock starts
    gated: bool = False  # say "ready" when set up, load after a line on stdin
    options: dict[str, str] = field(default_factory=dict)

    @property
    def bucket(self) -> str:
        """Return the bucket's name."""
        return self.uri.removeprefix("s3://").split("/", 1)[0]

    @property
    def url(self) -> str:
        """Return the plain HTTP(S) address of the model's prefix."""
        return f"{self.endpoint}/{self.uri.removeprefix('s3://')}"

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        values["files"] = tuple(values["files"])
        values["keys"] = tuple(values["keys"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the process of one sample measured about itself."""

    import_s: float  # imports and clients, before the clock starts
    load_s: float  # from the call to the last tensor in the caller's hands
    first_tensor_s: float
    fault_s: float  # then: one byte of every page
    checksum_s: float  # then: every byte
    cpu_s: float  # user and system time during load_s, child processes included
    rss_before_bytes: int  # after the imports
    rss_peak_bytes: int  # VmHWM when load_s ended
    started_at_s: float  # wall clock at the call
    ready_at_s: float  # wall clock at the last tensor
    tensors: int
    size_bytes: int
    checksum: str  # of all tensors by name; empty for raw transfers
    maps: bool  # tensors are mapped: their pages arrive with fault_s

    @property
    def wall_s(self) -> float:
        """Return the time until all bytes are in memory."""
        return self.load_s + (self.fault_s if self.maps else 0.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample as the report keeps it: an outcome, or the reason why there is none."""

    cell: str  # cold/loopback/http, cold/2gbit/http, warm/cached, ...
    label: str  # the peer with its options, as printed
    round: int
    outcome: Outcome | None
    error: str = ""
    wire_bytes: int = 0  # sent by the server, headers included
    body_bytes: int = 0  # without headers
    requests: int = 0
    first_request_at_s: float = 0.0  # wall clock of the first request for model data
    exit_s: float = 0.0  # from the last line printed to the end of the process
    stored_bytes: int = 0  # allocated in the sample's store or download folder afterwards
    resident: float = 0.0  # part of the files in the page cache before the sample
    data_bytes: int = 0  # of objects, without listings and headers
    mount: MountFacts | None = None  # of a sample of the scenario `mount`

    @property
    def transfer_s(self) -> float:
        """Return the time from the first data request to the last tensor."""
        if self.outcome is None or not self.first_request_at_s:
            return 0.0
        return self.outcome.ready_at_s - self.first_request_at_s

    def to_dict(self) -> dict[str, object]:
        """Return what goes into the JSON report."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read what `to_dict` returned."""
        names = {f.name for f in fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        if known.get("outcome") is not None:
            known["outcome"] = Outcome(**known["outcome"])
        if known.get("mount") is not None:
            known["mount"] = MountFacts(**known["mount"])
        return cls(**known)
