"""A local reader's copy of a chunk: out of its flight while that arrives, or from disk."""

import threading
import time
from collections.abc import Callable

from weightstream.cachefs.fetch.memory import populate
from weightstream.cachefs.fetch.source import Transfer
from weightstream.cachefs.store.write_back import copy
from weightstream.errors import LoadCancelled, UnavailableError
from weightstream.p2p.exchange.carrier import ArrivedError
from weightstream.p2p.exchange.flights import Flight, FlightState
from weightstream.p2p.exchange.relay import Relay

_STEP_BYTES = 1 << 20
_LOOK_S = 0.05
"""How soon a read that waits sees that a fault has come to it."""


class ChunkReader:
    """Reads parts of chunks. Thread-safe."""

    def __init__(self, deadline_s: float, is_closed: Callable[[], bool]) -> None:
        self._deadline_s = deadline_s
        self._is_closed = is_closed

    def read(
        self, relay: Relay, i: int, offset: int, into: memoryview, transfer: Transfer, urgent: bool
    ) -> None:
        """Copy a part of a chunk out of its flight, while it arrives where that is allowed; of
        another flight, or from disk, when the memory of the first was needed meanwhile."""
        done, until_s = 0, time.monotonic() + self._deadline_s
        while done < len(into):
            fresh = transfer.is_fresh and not done
            count = self._read_some(relay, i, offset + done, into[done:], transfer, urgent, fresh)
            done += count
            if count:
                until_s = time.monotonic() + self._deadline_s
            elif time.monotonic() > until_s:
                raise UnavailableError(f"{relay.blob.uri} {relay.chunk(i)}: its memory was needed")

    def _read_some(
        self,
        relay: Relay,
        i: int,
        offset: int,
        into: memoryview,
        transfer: Transfer,
        urgent: bool,
        fresh: bool,
    ) -> int:
        flight = relay.flight(i)
        if flight is None and relay.is_stored(i):
            if fresh:
                populate(into)
            if relay.read_stored(i, offset, into):
                transfer.advance(len(into))
                return len(into)
        flight = relay.want(i, urgent)
        cancelled = threading.Event()

        def cancel() -> None:
            cancelled.set()
            flight.wake()

        transfer.on_cancel(cancel)
        try:
            return self._copy(relay, flight, offset, into, transfer, cancelled, fresh)
        except ArrivedError as error:
            if fresh:
                populate(into)
            if not relay.read_stored(i, offset, into):
                raise UnavailableError(f"{relay.blob.uri} {relay.chunk(i)}: gone again") from error
            transfer.advance(len(into))
            return len(into)
        finally:
            transfer.on_cancel(None)

    def _copy(
        self,
        relay: Relay,
        flight: Flight,
        offset: int,
        into: memoryview,
        transfer: Transfer,
        cancelled: threading.Event,
        fresh: bool,
    ) -> int:
        """Return how many bytes were copied: fewer when the flight's memory was needed."""
        done, until_s = 0, time.monotonic() + self._deadline_s
        while done < len(into):
            visible = flight.wait_beyond(offset + done, _LOOK_S, local=True)
            if cancelled.is_set() or self._is_closed():
                raise LoadCancelled(f"{flight.blob.uri} {flight.extent}: not wanted any more")
            if flight.state is FlightState.FAILED:
                assert flight.error is not None
                raise flight.error
            count = min(visible - offset, len(into)) - done
            count = min(count, _STEP_BYTES)
            if count <= 0:
                if transfer.urgent:
                    relay.hurry(flight)
                if time.monotonic() > until_s:
                    raise UnavailableError(f"{flight.blob.uri} {flight.extent}: no byte in time")
                continue
            slab = flight.hold()
            if slab is None:
                return done
            if fresh and not done:
                populate(into)
            try:
                copy(slab.view[offset + done : offset + done + count], into[done : done + count])
            finally:
                slab.release()
            done += count
            until_s = time.monotonic() + self._deadline_s
            transfer.advance(count)
        if offset + done == len(flight.extent):
            flight.unread = False
        return done
