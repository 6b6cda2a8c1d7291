"""What the plug-in reads and writes beside the controller's loop, on a thread of its own.

The loop must not wait for the registry or for agents, so it finds here what was true a moment ago,
and leaves here what others shall see.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from weightstream.serve_integration import registry
from weightstream.serve_integration.compaction import ledger, tuning
from weightstream.serve_integration.compaction.ledger import State
from weightstream.serve_integration.compaction.tuning import Tuning
from weightstream.serve_integration.compaction.warming import Held

log = logging.getLogger("ray.serve")

_EVERY_S = 1.0
_STATE_EVERY_S = 5.0
_HOLDS_EVERY_S = 30.0
"""A question to every agent; a scheduling decision may rest on what was true half a minute ago."""
_COMPLAIN_EVERY_S = 60.0


@dataclass(slots=True)
class Desk:
    """Written by its thread and read by the loop, one attribute at a time."""

    held: Held
    tuning: Tuning = field(default_factory=Tuning)
    hurried: bool = False
    lease_holder: str = ""
    deployments: tuple[registry.Deployment, ...] = ()
    weights: Mapping[str, tuple[registry.Weights, ...]] = field(default_factory=dict)
    """By `app/deployment`."""
    holds: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Node -> URI -> bytes."""
    state: State | None = None
    """What the plug-in thinks."""
    _written: State | None = None
    _holds_at_s: float = -_HOLDS_EVERY_S
    _complained_s: float = -_COMPLAIN_EVERY_S

    def open(self) -> None:
        """Start the thread; it ends with the process."""
        threading.Thread(target=self._run, name="weightstream-compaction-desk", daemon=True).start()

    def show(self, state: State) -> None:
        """Let others see what the plug-in thinks, soon."""
        self.state = state

    def _run(self) -> None:
        while True:
            try:
                self.turn()
            except Exception:  # the registry may be away for a while, and tuning may be wrong
                self._complain()
            time.sleep(_EVERY_S)

    def turn(self) -> None:
        """Read and write everything once."""
        self._write_state()
        self.hurried = ledger.is_hurried()
        self.lease_holder = ledger.lease_holder()
        self.weights = read_weights(self.deployments)
        if time.monotonic() - self._holds_at_s >= _HOLDS_EVERY_S:
            self._holds_at_s = time.monotonic()
            self.holds = self.held(uris_of(self.weights))
        self.tuning = tuning.read()

    def _write_state(self) -> None:
        state, written, now = self.state, self._written, time.time()
        if state is None:
            return
        if written is None or _news(state, written) or now - written.heard >= _STATE_EVERY_S:
            self._written = replace(state, heard=now)
            ledger.write_state(self._written)

    def _complain(self) -> None:
        if time.monotonic() - self._complained_s >= _COMPLAIN_EVERY_S:
            self._complained_s = time.monotonic()
            log.exception("weightstream: compaction goes on with what it read before")


def read_weights(
    deployments: Iterable[registry.Deployment],
) -> dict[str, tuple[registry.Weights, ...]]:
    """Return what each deployment loads, by `app/deployment`."""
    return {f"{one.app}/{one.name}": registry.weights_of(one) for one in deployments}


def uris_of(weights: Mapping[str, Iterable[registry.Weights]]) -> tuple[str, ...]:
    """Return every model that any of them loads."""
    return tuple(sorted({one.uri for models in weights.values() for one in models}))


def _news(one: State, other: State) -> bool:
    return (one.phase, one.node_id, one.verdicts, one.failures, one.emptied) != (
        other.phase, other.node_id, other.verdicts, other.failures, other.emptied,
    )  # fmt: skip
