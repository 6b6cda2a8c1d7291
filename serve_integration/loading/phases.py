"""The phases of one load: what the program did, and what its weights did meanwhile.

    program   process ........ import .......................... | to device, ready
    weights            header, first byte .......... last byte   |

The two run side by side, so `header` may be earlier than `import`: that is the point of them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the registry needs Ray, a load does not
    from weightstream.loader.report import LoadReport
    from weightstream.serve_integration.loading.upstream import AgentCounts
    from weightstream.serve_integration.registry import Warmth

Phase = Literal["process", "import", "header", "first_byte", "last_byte", "to_device", "ready"]
PHASES: tuple[Phase, ...] = (
    "process",
    "import",
    "header",
    "first_byte",
    "last_byte",
    "to_device",
    "ready",
)

_WARMTH_OF: "dict[str, Warmth]" = {
    "origin": "origin",
    "peer": "peer",
    "store": "disk",
    "mapped": "disk",
}


@dataclass(frozen=True, slots=True)
class Phases:
    """When each phase of a load ended, in seconds since `began_at`; None for what did not occur."""

    uri: str
    began_at: float
    """Unix time at which the replica's process began, or a later load was asked for."""
    process_s: float
    """weightstream was called for the first time: `prefetch`, or `load_model` itself."""
    import_s: float
    """torch is imported and `load_model` was called."""
    header_s: float
    first_byte_s: float | None
    last_byte_s: float | None
    """None, as the first byte, where the weights were mapped."""
    to_device_s: float
    """Every tensor is on its device, in its dtype."""
    ready_s: float
    """The module can answer."""
    warmth: "Warmth"
    bytes_total: int
    bytes_by_source: Mapping[str, int]
    is_start: bool
    """The load was part of a replica's start, and not of a later request or reload."""

    def ends(self) -> dict[Phase, float]:
        """Return the phases that occurred, by name."""
        ends: dict[Phase, float | None] = {phase: getattr(self, f"{phase}_s") for phase in PHASES}
        return {phase: end for phase, end in ends.items() if end is not None}

    def to_json(self) -> dict[str, object]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> "Phases | None":
        """Read what another process noted; None for what another version wrote."""
        known = {field.name for field in fields(cls)}
        if isinstance(document, dict) and document.keys() == known:
            return cls(**document)
        return None


@dataclass(frozen=True, slots=True)
class Instants:
    """One load as its process saw it: unix times, and the loader's own report."""

    called_at: float
    imported_at: float
    fetch_began_at: float
    report: "LoadReport"
    to_device_at: float
    ready_at: float
    in_memory: bool
    is_start: bool
    agent: "AgentCounts"

    def upstream(self) -> "Warmth":
        """Return where the agent had most of what it gave; asks it, where it gave most."""
        if warmth_of(self.report.bytes_by_source, in_memory=False) != "peer":
            return "peer"
        found = self.agent.upstream()
        return "disk" if found == "store" else found

    def since(self, began_at: float, upstream: "Warmth" = "peer") -> Phases:
        """Return the phases, counted from an instant; `upstream` is where an agent's bytes were."""
        report, offset_s = self.report, self.fetch_began_at - began_at

        def fetched(end_s: float | None) -> float | None:
            return None if end_s is None else offset_s + end_s

        return Phases(
            uri=report.uri,
            began_at=began_at,
            process_s=self.called_at - began_at,
            import_s=self.imported_at - began_at,
            header_s=offset_s + report.header_s,
            first_byte_s=fetched(report.first_byte_s),
            last_byte_s=fetched(report.last_byte_s),
            to_device_s=self.to_device_at - began_at,
            ready_s=self.ready_at - began_at,
            warmth=warmth_of(report.bytes_by_source, in_memory=self.in_memory, upstream=upstream),
            bytes_total=report.bytes_total,
            bytes_by_source=dict(report.bytes_by_source),
            is_start=self.is_start,
        )


def warmth_of(
    bytes_by_source: Mapping[str, int], *, in_memory: bool, upstream: "Warmth" = "peer"
) -> "Warmth":
    """Return where most of a model's bytes came from; what was on the node may be in its memory."""
    most = max(bytes_by_source, key=lambda source: bytes_by_source[source], default="origin")
    warmth = upstream if most == "agent" else _WARMTH_OF.get(most, "origin")
    return "memory" if warmth == "disk" and in_memory else warmth
