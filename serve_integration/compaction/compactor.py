"""`--now` and `--watch`: with the engine that can, until nothing is left to do, or for good."""

import os
import socket
import threading
import time
from collections.abc import Callable

from weightstream.errors import ClusterError
from weightstream.serve_integration.compaction import ledger, serving
from weightstream.serve_integration.compaction.drain import Drainer
from weightstream.serve_integration.compaction.ledger import State, leased
from weightstream.serve_integration.compaction.survey import NO_PLUGIN, why_not_in_controller

Told = Callable[[State], None]

_EVERY_S = 0.5
_HURRY_S = 15.0
"""Renewed all the time, so that the plug-in does not hurry on for somebody who is gone."""


def compact_now(ended: threading.Event, told: Told) -> State:
    """Compact without the waits until no node can be emptied; return what was thought last.

    Stops at the first failure, too, and when `ended` is set. Raises `ClusterError` when somebody
    else compacts.
    """
    if not why_not_in_controller(serving.served(), ledger.read_state()):
        return _hurried(ended, told)
    with leased(_name()) as lease:
        return _drained(Drainer(lease, hurried=True), ended, told, _is_over)


def watch(ended: threading.Event, told: Told) -> None:
    """Compact until `ended` is set: drain nodes whenever the plug-in in the controller does not.

    Raises `ClusterError` when somebody else drains nodes, or Serve is gone.
    """
    while not ended.is_set():
        try:
            _compacted(ended, told)
        except ClusterError as error:
            _bear(error, told)


def _compacted(ended: threading.Event, told: Told) -> None:
    """Compact with the engine that can now, until the other one has to."""
    if not why_not_in_controller(serving.served(), ledger.read_state()):
        _attended(ended, told)
        return
    with leased(_name()) as lease:
        drainer = Drainer(lease)
        _drained(drainer, ended, told, lambda _: _is_relieved(drainer))


def _bear(error: ClusterError, told: Told) -> State:
    """Go on after an error that passes: a controller that restarts answers within seconds."""
    if not error.transient:
        raise error
    state = State("blocked", str(error))
    told(state)
    time.sleep(_EVERY_S)
    return state


def _drained(
    drainer: Drainer, ended: threading.Event, told: Told, is_over: Callable[[State], bool]
) -> State:
    state = State("waiting", "looking at the nodes")
    while not ended.wait(_EVERY_S):
        try:
            state = drainer.turn()
            told(state)
        except ClusterError as error:
            state = _bear(error, told)
        if is_over(state):
            break
    return state


def _is_over(state: State) -> bool:
    return state.phase == "settled" or state.failures > 0


def _is_relieved(drainer: Drainer) -> bool:
    """Say whether the plug-in can go on instead."""
    served = drainer.served
    if drainer.is_draining or served is None:
        return False
    return not why_not_in_controller(served, ledger.read_state())


def _attended(ended: threading.Event, told: Told) -> None:
    """Tell what the plug-in thinks, as long as it compacts."""
    while not ended.wait(_EVERY_S):
        state = ledger.read_state()
        if why_not_in_controller(serving.served(), state) or state is None:
            return
        told(state)


def _hurried(ended: threading.Event, told: Told) -> State:
    state = first = _said()
    try:
        while not ended.wait(_EVERY_S):
            ledger.hurry(_HURRY_S)
            state = _said()
            told(state)
            looked = state.at > first.at and state.phase in ("settled", "blocked")
            if looked or state.failures > first.failures:
                break
    finally:
        ledger.hurry(0)
    return state


def _said() -> State:
    state = ledger.read_state()
    if state is None:
        raise ClusterError(f"{NO_PLUGIN} any more")
    return state


def _name() -> str:
    return f"`weightstream serve compact` on {socket.gethostname()}, pid {os.getpid()},"
