"""How long the next replica will take to start, from how long the last ones took."""

import logging
import math
from collections.abc import Iterable
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightstream.serve_integration.registry import Deployment, Warmth

logger = logging.getLogger("ray.serve")

_REREAD_S = 10.0
"""A read costs the controller's loop a millisecond; a start takes seconds and changes slowly."""
_COLD = ("origin", "peer")


def expected_start_s(starts: "Iterable[tuple[Warmth, float]]") -> float:
    """Return how long a start will take: the median of the cold ones, else of the warm; 0 if none.

    A replica on top of those that run goes to a node that may not hold the model. Taken for cold it
    is ready early, which costs seconds of one replica; taken for warm it is late for everybody.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    for warmth, seconds in starts:
        times[warmth in _COLD].append(seconds)
    return median(times[True] or times[False] or [0.0])


class Starts:
    """Reads a deployment's starts from the registry now and then."""

    def __init__(self) -> None:
        self._read_s = -math.inf
        self._expected_s = 0.0

    def expected_s(self, deployment: "Deployment", now_s: float) -> float:
        """Return how long a start will take, as of the last reading; 0 where nobody knows."""
        from weightstream.serve_integration.registry import starts_of

        if now_s - self._read_s >= _REREAD_S:
            self._read_s = now_s
            try:
                starts = starts_of(deployment)
                self._expected_s = expected_start_s((one.warmth, one.seconds) for one in starts)
            except Exception as error:  # scaling must go on without the registry
                logger.warning(f"{deployment.app}/{deployment.name}: no start times: {error}")
        return self._expected_s
