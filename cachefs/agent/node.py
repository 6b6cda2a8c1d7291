"""What runs in the agent: store, engine, origins, peers, and who is served by them.

The agent reads for others from one source: its peers where it has some, else the origin itself. It
neither writes nor locks the chunks that it reads for a client: the client's engine does.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from weightstream import metrics
from weightstream.cachefs.agent.arena import Arena
from weightstream.cachefs.agent.fills import Prefetches
from weightstream.cachefs.agent.origins import Origins
from weightstream.cachefs.agent.peering import Peering
from weightstream.cachefs.agent.server import DataServer
from weightstream.cachefs.blob import Blob, Extent
from weightstream.cachefs.fetch import Engine, process_engine
from weightstream.cachefs.fetch.source import Plan, Source
from weightstream.cachefs.store import Store
from weightstream.errors import StoreError, UsageError
from weightstream.settings import Settings

log = logging.getLogger(__name__)

PeeringOf = Callable[[Settings, Store, Engine, Origins], Peering | None]

_HOUSE_S = 1.0
_ARENA_IDLE_S = 3.0
_ARENA_WARM_BYTES = 128 << 20  # pages that the next load need not fault in again
_EVICT_EVERY_S = 60.0
_DISK_S = 2.0


class Agent:
    """Everything but the sockets of the control API. `close` it."""

    def __init__(self, settings: Settings, roots: Sequence[str], peering_of: PeeringOf) -> None:
        """`roots`: the origins of the configuration; clients add theirs."""
        self.settings = settings
        self.started_s = time.time()
        self.store = Store.open(settings)
        self.engine = process_engine(settings)
        self.origins = Origins(settings, roots)
        self.peering = peering_of(settings, self.store, self.engine, self.origins)
        self.prefetches = Prefetches(settings, self.store, self.source_under)
        self._arena = _arena(settings, self.engine)
        self._data = DataServer(settings.run_directory, self._arena, self)
        self._closing = threading.Event()
        self.draining = False
        threading.Thread(target=self._keep_house, daemon=True, name="weightstream-house").start()

    def prepare(self) -> None:
        """Do what the first load would wait for: import an SDK, make a client, fault memory in."""
        self.origins.prepare()
        if self._arena is not None:
            self._arena.warm(_ARENA_WARM_BYTES)

    def source_of(self, root: str, blob: Blob) -> Source:
        """Return where to read a blob that a client on this node wants."""
        origin = self._admitted(root, blob)
        return origin if self.peering is None else self.peering

    def source_under(self, uri: str) -> Source | None:
        """Return where to read what lies under `uri`; None when that is its origin."""
        self.origins.admit(uri)
        return self.peering

    def plan(self, root: str, wanted: Sequence[tuple[Blob, tuple[Extent, ...]]]) -> Plan:
        """Begin with what a client is going to want, as far as peers are there to begin with."""
        for blob, _ in wanted:
            self._admitted(root, blob)
        return NoPlan() if self.peering is None else self.peering.plan(wanted)

    @property
    def connections(self) -> int:
        """Return how many clients are connected."""
        return self._data.connections

    def drain(self) -> None:
        """Serve peers nothing new; clients on this node are served on."""
        self.draining = True
        if self.peering is not None:
            self.peering.drain()

    def close(self) -> None:
        """End everything, within about three seconds: clients read on from the origin."""
        self._closing.set()
        self.drain()  # so that peers need not find out
        self._data.close()
        self.prefetches.close()
        if self.peering is not None:
            self.peering.close()
        self.engine.write_back.drain(_DISK_S)
        self.origins.close()

    def _admitted(self, root: str, blob: Blob) -> Source:
        self.origins.admit(root)
        origin = self.origins.source_for(blob)
        if origin is None:
            raise UsageError(f"{blob.uri} does not lie under {root}")
        return origin

    def _keep_house(self) -> None:
        """Free memory that nobody uses; keep the store within its limits."""
        next_s = 0.0
        while not self._closing.wait(_HOUSE_S):
            metrics.AGENT_CLIENTS.set(self.connections)
            if self._arena is not None:
                self._arena.trim(_ARENA_IDLE_S, _ARENA_WARM_BYTES)
            if self.store.writable and time.monotonic() >= next_s:
                next_s = time.monotonic() + _EVICT_EVERY_S
                self._evict()

    def _evict(self) -> None:
        try:
            removed = self.store.evict()
        except StoreError as error:
            log.info("the store is not kept within its limits: %s", error)
            return
        if removed:
            freed = sum(info.allocated_bytes for info in removed)
            log.info("removed %d files, %d bytes: the store's limits", len(removed), freed)


class NoPlan:
    """A plan of a source that has nothing to begin with."""

    def hurry(self, blob: Blob, extent: Extent) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """End nothing."""


def _arena(settings: Settings, engine: Engine) -> Arena | None:
    try:
        return Arena(engine.budget, max(settings.range_size, settings.chunk_size))
    except OSError as error:
        log.info("bytes go over the socket, for there is no shared memory: %s", error)
        return None
