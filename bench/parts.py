"""What one part of a run (loads, mounts) hands to the report."""

from dataclasses import dataclass

from weightstream.bench.claims import Claim
from weightstream.bench.jobs import Sample


@dataclass(frozen=True, slots=True)
class Part:
    """Samples with their cells' titles, and the targets computed from them."""

    server: str = ""
    titles: tuple[tuple[str, str], ...] = ()
    samples: tuple[Sample, ...] = ()
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()
    packages: frozenset[str] = frozenset()

    def __add__(self, other: "Part") -> "Part":
        return Part(
            other.server or self.server,
            self.titles + other.titles,
            self.samples + other.samples,
            self.claims + other.claims,
            self.notes + other.notes,
            self.packages | other.packages,
        )
