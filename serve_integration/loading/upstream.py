"""Where the agent of this node had the bytes from that it gave to a load.

A loader sees only that its agent gave them. The agent counts what it reads from peers and from the
origin; the two counts before and after a load say which was more. Other loads of the node at the
same time are in them, too: with the same model, as a rule.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

from weightstream.cachefs.agent import asking
from weightstream.cachefs.agent.asking import NoAgent
from weightstream.cachefs.agent.finding import CONTROL_SOCKET

Upstream = Literal["origin", "peer", "store"]

_LONGEST_S = 10.0


class AgentCounts:
    """What the agent has read, asked beside the load that begins now."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._before: Future[Mapping[str, int] | None] = Future()
        threading.Thread(target=self._ask, name="weightstream-agent-counts", daemon=True).start()

    def upstream(self) -> Upstream:
        """Return where most came from since; `store` when nothing was read. Blocks a little.

        An agent without peers reads from the origin; of one that is gone nobody knows better.
        """
        before, after = self._before.result(_LONGEST_S), _read(self._directory)
        if before is None or after is None:
            return "origin"
        return most(before, after)

    def _ask(self) -> None:
        try:
            self._before.set_result(_read(self._directory))
        except BaseException as error:
            self._before.set_exception(error)  # for whoever asks


def most(before: Mapping[str, int], after: Mapping[str, int]) -> Upstream:
    """Return which count grew more."""
    origin, peers = (after.get(way, 0) - before.get(way, 0) for way in ("origin", "received"))
    if origin <= 0 and peers <= 0:
        return "store"
    return "origin" if origin > peers else "peer"


def _read(directory: Path) -> Mapping[str, int] | None:
    """Return the agent's counts; None where there are none."""
    if not (directory / CONTROL_SOCKET).exists():
        return None
    try:
        said = asking.status(directory)["peers"]
    except NoAgent:
        return None
    return said["bytes"] if said is not None else None
