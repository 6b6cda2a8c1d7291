"""How long to wait before a server is started again (pure)."""

from dataclasses import dataclass

_FIRST_S = 0.5
_MOST_S = 10.0
_HEALTHY_S = 60.0  # a server that lived this long did not die of what killed the one before


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits of 0, 0.5, 1, 2, 4, 8, 10, 10... seconds, until a server has lived for a minute."""

    failures: int = 0

    def after(self, lived_s: float) -> "tuple[float, Backoff]":
        """Return how long to wait now that a server died that served for so long, and the next."""
        failures = 0 if lived_s >= _HEALTHY_S else self.failures
        wait_s = min(_MOST_S, _FIRST_S * 2 ** (failures - 1)) if failures else 0.0
        return wait_s, Backoff(min(failures + 1, 16))
